"""Tokenizers with special tokens: loaded, extended, saved."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gem_vllm.config import special_token
from gem_vllm.errors import GemConfigError, first_line
from gem_vllm.folders import read_json, write_json


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``; GemConfigError if it has none."""
    try:
        # Not Mistral's own format, which takes no further tokens and may lie beside it.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, mistral_format=False)
    except Exception as error:  # tokenizers raises no class of its own for a file that is broken
        reason = first_line(error)
        raise GemConfigError(f"{folder} has no tokenizer that can be loaded: {reason}") from error


def append_tokens(tokenizer: PreTrainedTokenizerBase, k: int) -> tuple[int, ...]:
    """Add ``<|gem_0|>`` ... to ``tokenizer``, marked special; return their ids."""
    tokens = [special_token(i) for i in range(k)]
    if taken := [token for token in tokens if token in tokenizer.get_vocab()]:
        raise GemConfigError(
            f"the tokenizer has {taken[0]} already; start from a base model, not from a checkpoint"
        )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": tokens}, replace_extra_special_tokens=False
    )
    return tuple(tokenizer.convert_tokens_to_ids(tokens))


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save ``tokenizer``, without what transformers notes about how it was loaded."""
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "mistral_format", "name_or_path"):
        config.pop(key, None)
    write_json(folder / "tokenizer_config.json", config)
