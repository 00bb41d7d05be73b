"""The adapter as files: taken out of a GEM checkpoint, and put together with its base again.

A GEM checkpoint in adapter mode is the base's weights, k rows of the embedding matrix, and
``gem_adapter/`` with the LoRA in PEFT's format. An adapter folder is the same without the base:
the rows go into PEFT's file, as ``trainable_token_indices``, and ``gem_config.json`` says which
base it belongs to.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from gem_vllm.config import (
    SUPPORTED_ARCHITECTURES,
    GemConfig,
    base_architecture,
    gem_architecture,
)
from gem_vllm.errors import GemConfigError
from gem_vllm.folders import read_json, refuse_inside, write_json, written_whole
from gem_vllm.tokens import append_tokens, load_tokenizer, write_tokenizer
from gem_vllm.weights import (
    EMBEDDING,
    copy_with_rows,
    read_tensor,
    read_tensors,
    weights_sha256,
    weights_size,
)

ADAPTER_FOLDER = "gem_adapter"

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_LORA = (".lora_A.weight", ".lora_B.weight")
_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Adapter:
    """What adapter mode adds to a base.

    Attributes:
        config: PEFT's ``adapter_config.json``.
        lora: name to tensor as in ``adapter_model.safetensors``: ``….lora_A.weight`` [r, in] and
            ``….lora_B.weight`` [out, r].
        rows: [k, hidden], the special tokens' input embeddings.
    """

    config: dict[str, Any]
    lora: dict[str, Tensor]
    rows: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.rows.nbytes + sum(tensor.nbytes for tensor in self.lora.values())

    def write(self, folder: Path, special_ids: tuple[int, ...] | None = None) -> None:
        """Write PEFT's two files; with ``special_ids``, the rows too."""
        config, tensors = dict(self.config), dict(self.lora)
        if special_ids is not None:
            config["trainable_token_indices"] = {"embed_tokens": list(special_ids)}
            tensors[_ROWS] = self.rows
        folder.mkdir(exist_ok=True)
        write_json(folder / _CONFIG, config)
        save_file(
            {name: tensors[name].contiguous() for name in sorted(tensors)},
            folder / _WEIGHTS,
            metadata={"format": "pt"},
        )


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder in PEFT's format.

    Raises:
        GemConfigError: a file is missing, or the adapter is not a plain LoRA.
    """
    if not (folder / _WEIGHTS).is_file():
        raise GemConfigError(f"{folder / _WEIGHTS} is missing; copy or download the folder again")
    config = read_json(folder / _CONFIG)
    check_plain_lora(config)
    tensors = read_tensors(folder / _WEIGHTS)
    if more := [name for name in sorted(tensors) if not name.endswith((*_LORA, _ROWS))]:
        raise GemConfigError(
            f"{folder / _WEIGHTS} has {more[0]}, which is of no plain LoRA; train one that is"
        )
    return config, tensors


def check_plain_lora(config: dict[str, Any]) -> None:
    """GemConfigError unless PEFT's ``config`` means y = W x + (alpha / r) B A x, no more."""
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",),
        "bias": ("none", None),
        "lora_dropout": (0, None),
        # Others (PiSSA, OLoRA, CorDA) take away from the base's weights what the LoRA begins with.
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica", None),
    }
    for option in (
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
        "lora_bias",
        "fan_in_fan_out",
        "layer_replication",
        "target_parameters",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "monteclora_config",
        *(option for option in config if option.startswith("use_")),  # rsLoRA, DoRA, BD-LoRA, ...
    ):
        allowed[option] = (False, None, {}, [])
    for option, values in allowed.items():
        if config.get(option) not in values:
            raise GemConfigError(
                f"{_CONFIG} has {option} = {config.get(option)!r}, which is not supported; "
                "train a plain LoRA (dropout 0, no bias, one rank for all layers)"
            )


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
    rows = tensors.pop(_ROWS, None)
    if rows is None or rows.shape[0] != gem_config.k:
        raise GemConfigError(
            f"{adapter / _WEIGHTS} does not hold {gem_config.k} special tokens' rows; make the "
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


def write_checkpoint(
    folder: Path,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    gem_config: GemConfig,
    adapter: Adapter,
) -> None:
    """Write the files of a checkpoint in adapter mode into the empty ``folder``.

    Args:
        folder: existing and empty.
        base: folder of the base, or of a checkpoint made from it: its tensors are copied.
        tokenizer: with the special tokens.
        gem_config: with `with_base`'s keys.
        adapter: LoRA and special rows.
    """
    write_tokenizer(folder, tokenizer)
    config = read_json(base / "config.json")
    base_rows = gem_config.extra["base_vocab_size"]
    tied = bool(config.get("tie_word_embeddings"))
    copy_with_rows(base, folder, base_rows, gem_config.special_token_ids, adapter.rows, tied)
    config["vocab_size"] = max(base_rows, max(gem_config.special_token_ids) + 1)
    write_configs(folder, config, gem_config, generation_config=base / "generation_config.json")
    adapter.write(folder / ADAPTER_FOLDER)


def write_configs(
    folder: Path, config: dict[str, Any], gem_config: GemConfig, generation_config: Path
) -> None:
    """Write ``config.json`` as a GEM checkpoint's, and ``generation_config.json``.

    transformers' own ``generate`` then never emits a special token either. Where the base has no
    such file, it has what transformers takes from ``config.json`` instead.
    """
    config["architectures"] = [gem_architecture(plain_architecture(config))]
    config["gem_config"] = gem_config.to_dict()
    write_json(folder / "config.json", config)
    if generation_config.is_file():
        generation = read_json(generation_config)
    else:
        plain = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(generation_config.parent)
        )
        generation = plain.to_diff_dict()
    suppressed = {*(generation.get("suppress_tokens") or []), *gem_config.special_token_ids}
    generation["suppress_tokens"] = sorted(suppressed)
    generation.pop("_from_model_config", None)
    write_json(folder / "generation_config.json", generation)


def with_base(gem_config: GemConfig, folder: Path) -> GemConfig:
    """``gem_config`` with what identifies the base: architecture, vocabulary, weights.

    Args:
        gem_config: of the checkpoint to be.
        folder: the base, or a GEM checkpoint made from it.
    """
    config = read_json(folder / "config.json")
    known = GemConfig.from_hf_config(config).extra if "gem_config" in config else {}
    rows = known.get("base_vocab_size", config["vocab_size"])
    extra = {
        **gem_config.extra,
        "base_architecture": plain_architecture(config),
        "base_vocab_size": rows,
        "base_sha256": weights_sha256(folder, min(rows, *gem_config.special_token_ids)),
    }
    return dataclasses.replace(gem_config, extra=extra)


def plain_architecture(config: dict[str, Any]) -> str:
    """The base's architecture, from the ``config.json`` of a base or of a GEM checkpoint.

    Raises:
        GemConfigError: none is named, or it is not supported.
    """
    architecture = (config.get("architectures") or ["(none named)"])[0]
    if architecture in SUPPORTED_ARCHITECTURES.values():
        return base_architecture(architecture)
    gem_architecture(architecture)
    return architecture


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
