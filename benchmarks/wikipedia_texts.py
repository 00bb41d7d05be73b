"""Wikipedia texts of this repository's ``examples/``, as the scripts here take them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark_script import ROOT

from gem_vllm.errors import GemError

TEXTS = ROOT / "examples" / "wikipedia_train.txt"
PROMPTS = ROOT / "examples" / "wikipedia_held_back.txt"
# Tokens of a text, from and to; the lengths between take turns.
SHORT, LONG = (24, 36), (200, 260)
TEXTS_OF_A_LENGTH = 240


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
