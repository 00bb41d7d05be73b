"""What `engine.py` needs to know of its texts and of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmark_script import ROOT
from safetensors import safe_open

from gem_vllm.errors import GemError

TEXTS = ROOT / "examples" / "wikipedia_train.txt"
PROMPTS = ROOT / "examples" / "wikipedia_held_back.txt"
# Tokens of a text, from and to; the lengths between take turns.
SHORT, LONG = (24, 36), (200, 260)
TEXTS_OF_A_LENGTH = 240
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def read_texts(base: Path) -> dict[str, Any]:
    """Token ids, by the base's tokenizer, of Wikipedia text: ``texts`` by task, and ``prompts``.

    A text is one paragraph, or several that follow each other, cut to its length.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    paragraphs = tokenizer(read_paragraphs(TEXTS))["input_ids"]
    prompts = tokenizer(read_paragraphs(PROMPTS))["input_ids"]
    return {
        "texts": {
            "embed 30": texts_of_length(paragraphs, *SHORT),
            "embed 230": texts_of_length(paragraphs, *LONG),
        },
        "prompts": texts_of_length(prompts, *SHORT),
    }


def read_paragraphs(file: Path) -> list[str]:
    """The lines of a text file of this repository."""
    if not file.is_file():
        raise GemError(f"{file.name} is missing; run this from a checkout with its examples/")
    return file.read_text(encoding="utf-8").splitlines()


def texts_of_length(
    paragraphs: Sequence[Sequence[int]], shortest: int, longest: int
) -> list[list[int]]:
    """Up to `TEXTS_OF_A_LENGTH` texts from whole paragraphs of token ids, each cut at its end.

    Lengths go from ``shortest`` to ``longest`` and start again.
    """
    texts: list[list[int]] = []
    text: list[int] = []
    for paragraph in paragraphs:
        text.extend(paragraph)
        length = shortest + len(texts) % (longest - shortest + 1)
        if len(text) >= length:
            texts.append(text[:length])
            text = []
    return texts[:TEXTS_OF_A_LENGTH]


def weight_bytes(folder: Path, dtype: str, only: str = "") -> int:
    """Bytes of a folder's safetensors weights in ``dtype``: "float32", or "auto" for their own.

    Args:
        folder: of a model or an adapter; 0 where it has no weights.
        dtype: as the engines get it.
        only: tensors whose names begin so.
    """
    return sum(
        math.prod(shape) * (4 if dtype == "float32" else DTYPE_BYTES[stored])
        for name, shape, stored in _tensors(folder)
        if name.startswith(only)
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Sequence[int], str]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                tensor = weights.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype()
