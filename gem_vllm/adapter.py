"""The adapter in a GEM checkpoint, which is read and written here.

A GEM checkpoint in adapter mode is the base's weights, k rows of the embedding matrix, and
``gem_adapter/`` with the LoRA in PEFT's format. `gem_vllm.adapter_files` takes an adapter out of
it, and puts it to its base again.
"""

from __future__ import annotations

import dataclasses
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
from gem_vllm.folders import read_json, write_json
from gem_vllm.tokens import write_tokenizer
from gem_vllm.weights import (
    copy_with_rows,
    read_tensors,
    weights_sha256,
)

ADAPTER_FOLDER = "gem_adapter"

_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LORA = (".lora_A.weight", ".lora_B.weight")
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


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
            tensors[ROWS] = self.rows
        folder.mkdir(exist_ok=True)
        write_json(folder / _CONFIG, config)
        save_file(
            {name: tensors[name].contiguous() for name in sorted(tensors)},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )


def read_lora(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder in PEFT's format.

    Raises:
        GemConfigError: a file is missing, or the adapter is not a plain LoRA.
    """
    if not (folder / WEIGHTS).is_file():
        raise GemConfigError(f"{folder / WEIGHTS} is missing; copy or download the folder again")
    config = read_json(folder / _CONFIG)
    check_plain_lora(config)
    tensors = read_tensors(folder / WEIGHTS)
    if more := [name for name in sorted(tensors) if not name.endswith((*_LORA, ROWS))]:
        raise GemConfigError(
            f"{folder / WEIGHTS} has {more[0]}, which is of no plain LoRA; train one that is"
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
