"""``gem_config``, the one key that a GEM checkpoint adds to a base model's ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemConfigError

__all__ = [
    "MAX_SPECIAL_TOKENS",
    "POOLINGS",
    "SUPPORTED_ARCHITECTURES",
    "TRAIN_MODES",
    "GemConfig",
    "base_architecture",
    "gem_architecture",
    "special_token",
]

MAX_SPECIAL_TOKENS = 64
POOLINGS = ("mean", "concat")
TRAIN_MODES = ("full", "lora", "adapter")
VERSIONS = (1, 2)

SUPPORTED_ARCHITECTURES: dict[str, str] = {
    f"{base}ForCausalLM": f"Gem{base}ForCausalLM"
    for base in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")
}


def special_token(i: int) -> str:
    """The text form of special token ``i``, counted from 0."""
    return f"<|gem_{i}|>"


def gem_architecture(base_arch: str) -> str:
    """``LlamaForCausalLM`` -> ``GemLlamaForCausalLM``; GemConfigError if it is not supported."""
    if base_arch not in SUPPORTED_ARCHITECTURES:
        raise _unsupported(base_arch)
    return SUPPORTED_ARCHITECTURES[base_arch]


def base_architecture(gem_arch: str) -> str:
    """``GemLlamaForCausalLM`` -> ``LlamaForCausalLM``; GemConfigError if it is not supported."""
    for base, gem in SUPPORTED_ARCHITECTURES.items():
        if gem == gem_arch:
            return base
    raise _unsupported(gem_arch)


def _unsupported(architecture: str) -> GemConfigError:
    supported = ", ".join(SUPPORTED_ARCHITECTURES)
    return GemConfigError(
        f"architecture {architecture} is not supported; use a base model of one of: {supported}"
    )


@dataclass(frozen=True)
class GemConfig:
    """What a checkpoint says about its special tokens.

    Attributes:
        special_token_ids: k ids, all different, in the order in which they are appended.
        pooling: ``mean`` or ``concat`` of the k hidden states.
        train_mode: ``full``, ``lora`` (merged into the weights) or ``adapter`` (a LoRA that acts
            at special positions only, beside the base's own weights).
        base_model: the base's name, or the folder it came from.
        version: of this format; 2 where there is an instruction, which readers of version 1 would
            leave out.
        instruction_ids: of an instruction that every text is followed by, before the special
            tokens; most checkpoints have none.
        extra: keys that this version does not know; kept when the checkpoint is written again.

    Raises:
        GemConfigError: a value that the format does not allow.
    """

    special_token_ids: tuple[int, ...]
    pooling: str = "mean"
    train_mode: str = "adapter"
    base_model: str = ""
    version: int = 1
    instruction_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if type(self.version) is not int or self.version not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise GemConfigError(
                f"gem_config version {self.version!r} is unknown, this gem-vllm reads version "
                f"{known}; upgrade gem-vllm"
            )
        object.__setattr__(self, "special_token_ids", _token_ids(self.special_token_ids))
        _one_of("pooling", self.pooling, POOLINGS)
        _one_of("train_mode", self.train_mode, TRAIN_MODES)
        if not isinstance(self.base_model, str):
            raise GemConfigError(
                f"gem_config base_model is {self.base_model!r}; give the base's name as a string"
            )
        object.__setattr__(self, "instruction_ids", _instruction_ids(self))
        if self.instruction_ids:
            object.__setattr__(self, "version", VERSIONS[-1])
        if shadowed := _KNOWN_KEYS.intersection(self.extra):
            raise GemConfigError(
                f"gem_config extra repeats {sorted(shadowed)}; set these as fields instead"
            )

    @property
    def appended_ids(self) -> tuple[int, ...]:
        """What goes behind a text to be embedded: an instruction, if any, the special tokens."""
        return self.instruction_ids + self.special_token_ids

    @property
    def k(self) -> int:
        """The number of special tokens."""
        return len(self.special_token_ids)

    def max_text_tokens(self, context: int) -> int:
        """The longest text to be embedded, in tokens, in a context of so many.

        One token less than there is room for: vLLM keeps it for the token that a generating
        engine samples behind every prompt.
        """
        return context - len(self.appended_ids) - 1

    def embedding_size(self, hidden_size: int) -> int:
        """The length of an embedding: the hidden size, or k times it for ``concat``."""
        return hidden_size * self.k if self.pooling == "concat" else hidden_size

    def to_dict(self) -> dict[str, Any]:
        """The value of ``gem_config`` in ``config.json``; unknown keys come last."""
        return {
            "version": self.version,
            "special_token_ids": list(self.special_token_ids),
            "pooling": self.pooling,
            "train_mode": self.train_mode,
            "base_model": self.base_model,
            **({"instruction_ids": list(self.instruction_ids)} if self.instruction_ids else {}),
            **self.extra,
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> GemConfig:
        """Read and check the value of ``gem_config``; GemConfigError says what is wrong."""
        if not isinstance(d, Mapping):
            raise GemConfigError(f"gem_config is {d!r}; it must be an object with keys and values")
        if missing := sorted(_KNOWN_KEYS.difference(d, {"instruction_ids"})):
            raise GemConfigError(f"gem_config lacks {', '.join(missing)}; add what is missing")
        known = {key: d[key] for key in _KNOWN_KEYS if key in d}
        return cls(**known, extra={key: d[key] for key in d if key not in _KNOWN_KEYS})

    @classmethod
    def from_hf_config(cls, config: Any) -> GemConfig:
        """Read ``gem_config`` from a transformers config object, or from ``config.json`` as a dict.

        Raises:
            GemConfigError: there is none, it is wrong, or an id is outside the vocabulary.
        """
        as_dict = isinstance(config, Mapping)
        found = config.get("gem_config") if as_dict else getattr(config, "gem_config", None)
        if found is None:
            raise GemConfigError(
                "config.json has no gem_config, so this is not a GEM checkpoint; "
                "make one with: gem-vllm train"
            )
        gem_config = cls.from_dict(found)
        vocab = config.get("vocab_size") if as_dict else getattr(config, "vocab_size", None)
        if vocab is not None and (highest := max(gem_config.appended_ids)) >= vocab:
            raise GemConfigError(
                f"gem_config names a token id {highest}, and the vocabulary ends at "
                f"{vocab - 1}; save the checkpoint again, with a row for each special token"
            )
        return gem_config

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> GemConfig:
        """Read ``gem_config`` from a checkpoint folder's ``config.json``.

        Raises:
            GemConfigError: no such file, no JSON, or as `from_hf_config`.
        """
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise GemConfigError(f"{file} is missing; name the folder of a GEM checkpoint")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise GemConfigError(f"{file} is not JSON ({error}); copy the folder again") from error
        try:
            return cls.from_hf_config(config)
        except GemConfigError as error:
            raise GemConfigError(f"{folder}: {error}") from None


_KNOWN_KEYS = frozenset(
    {"version", "special_token_ids", "pooling", "train_mode", "base_model", "instruction_ids"}
)


def _instruction_ids(config: GemConfig) -> tuple[int, ...]:
    ids = config.instruction_ids
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
        raise GemConfigError(
            f"gem_config instruction_ids is {ids!r}; it must be a list of token ids"
        )
    if not set(config.special_token_ids).isdisjoint(ids):
        raise GemConfigError("gem_config instruction_ids names a special token; take it out")
    return tuple(ids)


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not isinstance(ids, (list, tuple)) or not all(type(i) is int and i >= 0 for i in ids):
        raise GemConfigError(
            f"gem_config special_token_ids is {ids!r}; it must be a list of token ids (integers)"
        )
    if not 1 <= len(ids) <= MAX_SPECIAL_TOKENS:
        raise GemConfigError(
            f"gem_config special_token_ids has {len(ids)} ids; give 1 to {MAX_SPECIAL_TOKENS}"
        )
    if len(set(ids)) < len(ids):
        raise GemConfigError(
            f"gem_config special_token_ids repeats an id: {list(ids)}; each id may occur once"
        )
    return tuple(ids)


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise GemConfigError(
            f"gem_config {key} is {value!r}; it must be one of: {', '.join(allowed)}"
        )
