"""The adapter as a folder of its own: taken out of a GEM checkpoint, and put to its base again.

Such a folder is `gem_vllm.adapter`'s two files of PEFT's, the special tokens' rows among them as
``trainable_token_indices``, and ``gem_config.json``, which says which base it belongs to.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from gem_vllm.adapter import (
    ADAPTER_FOLDER,
    ROWS,
    WEIGHTS,
    Adapter,
    plain_architecture,
    read_lora,
    write_checkpoint,
)
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemConfigError
from gem_vllm.folders import read_json, refuse_inside, write_json, written_whole
from gem_vllm.tokens import append_tokens, load_tokenizer
from gem_vllm.weights import EMBEDDING, read_tensor, weights_sha256, weights_size


def extract_adapter(checkpoint: str | Path, out: str | Path) -> None:
    """Take the adapter out of a GEM checkpoint (the command ``gem-vllm adapter extract``).

    Args:
        checkpoint: folder of a GEM checkpoint in adapter mode; its ``README.md`` is copied.
        out: folder to write; see `gem_vllm.folders.written_whole`.

    Raises:
        GemConfigError: not such a checkpoint.
        GemError: ``out`` is in it.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    refuse_inside(out, checkpoint)
    gem_config = GemConfig.from_pretrained(checkpoint)
    if gem_config.train_mode != "adapter":
        raise GemConfigError(
            f"{checkpoint} has train_mode {gem_config.train_mode!r}, so its training is in its "
            "weights; only a checkpoint of train_mode 'adapter' has an adapter to take out"
        )
    config, lora = read_lora(checkpoint / ADAPTER_FOLDER)
    rows = read_tensor(checkpoint, EMBEDDING)[list(gem_config.special_token_ids)]
    adapter = Adapter(config, lora, rows)
    with written_whole(out, weight_bytes=adapter.nbytes) as folder:
        adapter.write(folder, gem_config.special_token_ids)
        write_json(folder / "gem_config.json", gem_config.to_dict())
        _copy_card(checkpoint, folder)


def apply_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Put a base and an adapter together (the command ``gem-vllm adapter apply``).

    The result is, byte for byte, the checkpoint that the adapter was taken from.

    Args:
        base: folder of the base model, with the very weights the adapter was trained on.
        adapter: folder that `extract_adapter` wrote.
        out: folder to write; see `gem_vllm.folders.written_whole`.

    Raises:
        GemConfigError: base and adapter do not fit, or either is incomplete.
        GemError: ``out`` is in one of them.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    refuse_inside(out, base, adapter)
    gem_config = GemConfig.from_dict(read_json(adapter / "gem_config.json"))
    config, tensors = read_lora(adapter)
    rows = tensors.pop(ROWS, None)
    if rows is None or rows.shape[0] != gem_config.k:
        raise GemConfigError(
            f"{adapter / WEIGHTS} does not hold {gem_config.k} special tokens' rows; make the "
            "folder again with: gem-vllm adapter extract"
        )
    _check_fit(base, gem_config, rows)
    tokenizer = load_tokenizer(base)
    if append_tokens(tokenizer, gem_config.k) != gem_config.special_token_ids:
        raise GemConfigError(
            f"the tokenizer of {base} gives the special tokens other ids than the adapter's "
            f"{list(gem_config.special_token_ids)}; use the base that it was trained on"
        )
    read = Adapter({**config, "trainable_token_indices": None}, tensors, rows)
    with written_whole(out, weight_bytes=weights_size(base) + read.nbytes) as folder:
        write_checkpoint(folder, base, tokenizer, gem_config, read)
        _copy_card(adapter, folder)


def _check_fit(base: Path, gem_config: GemConfig, rows: Tensor) -> None:
    lacks = {"base_architecture", "base_vocab_size", "base_sha256"}.difference(gem_config.extra)
    if lacks:
        raise GemConfigError(
            f"the adapter's gem_config.json lacks {', '.join(sorted(lacks))}; make the folder "
            "again with: gem-vllm adapter extract"
        )
    config = read_json(base / "config.json")
    found = {
        "architecture": plain_architecture(config),
        "hidden size": config.get("hidden_size"),
        "vocabulary size": config.get("vocab_size"),
    }
    wanted = {
        "architecture": gem_config.extra["base_architecture"],
        "hidden size": rows.shape[1],
        "vocabulary size": gem_config.extra["base_vocab_size"],
    }
    for what, value in wanted.items():
        if found[what] != value:
            raise GemConfigError(
                f"the adapter is for {gem_config.base_model} with {what} {value}, and {base} has "
                f"{found[what]}; use the base that it was trained on"
            )
    hashed = weights_sha256(base, min(wanted["vocabulary size"], *gem_config.special_token_ids))
    if hashed != gem_config.extra["base_sha256"]:
        raise GemConfigError(
            f"the weights of {base} are not those that the adapter was trained on (sha256 "
            f"{hashed[:12]}, not {gem_config.extra['base_sha256'][:12]}); use that very version "
            f"of {gem_config.base_model}"
        )


def _copy_card(source: Path, folder: Path) -> None:
    if (source / "README.md").is_file():
        shutil.copyfile(source / "README.md", folder / "README.md")
