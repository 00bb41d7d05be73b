"""Labelled pairs, where there are some: texts that belong together, and others that do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemError
from gem_vllm.training.data import is_jsonl, read_jsonl


@dataclass(frozen=True)
class PairSource:
    """The pairs of a ``--pairs`` file: objects with ``anchor``, ``positive``, maybe ``negative``.

    Iterating gives [anchor, positive, negatives...], one list of texts a pair; ``negative`` is a
    text or a list of them. Raises GemError, with file and line, for what is not so.
    """

    file: Path

    def __iter__(self) -> Iterator[list[str]]:
        for where, row in read_jsonl(self.file):
            yield _texts(row, where)

    def check(self) -> None:
        """Raise GemError unless the file can be read and its first pair is one."""
        if not self.file.is_file() or not is_jsonl(self.file):
            raise GemError(f"--pairs {self.file}: give a .jsonl or .jsonl.gz file")
        if next(iter(self), None) is None:
            raise GemError(f"--pairs {self.file} holds no pair")


def _texts(row: Any, where: str) -> list[str]:
    if not isinstance(row, dict) or not {"anchor", "positive"} <= row.keys():
        raise GemError(f"{where}: expected an object with anchor, positive and, if any, negative")
    negative = row.get("negative") or []
    texts = [
        row["anchor"],
        row["positive"],
        *([negative] if isinstance(negative, str) else negative),
    ]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise GemError(f"{where}: anchor, positive and negative must be texts that are not empty")
    return texts
