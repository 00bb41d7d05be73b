"""Labelled pairs, where there are some: texts that belong together, and others that do not."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemError
from gem_vllm.folders import writable_parent
from gem_vllm.training.data import is_jsonl, open_text, read_jsonl


@dataclass(frozen=True)
class Pair:
    """Texts that belong together, and others that do not; no positive: it is to be made."""

    anchor: str
    positive: str | None
    negatives: list[str]


@dataclass(frozen=True)
class PairSource:
    """The pairs of a ``--pairs`` file: objects with ``anchor``, maybe ``positive``, ``negative``.

    Iterating gives them in order; ``negative`` is a text or a list of them. Raises GemError, with
    file and line, for what is not so.
    """

    file: Path

    def __iter__(self) -> Iterator[Pair]:
        for where, row in read_jsonl(self.file):
            yield _pair(row, where)

    def check(self) -> None:
        """Raise GemError unless the file can be read and its first pair is one."""
        if not os.path.isfile(self.file) or not is_jsonl(self.file):
            raise GemError(f"--pairs {self.file}: give a .jsonl or .jsonl.gz file")
        if next(iter(self), None) is None:
            raise GemError(f"--pairs {self.file} holds no pair")


def check_pairs_file(out: Path) -> None:
    """Raise GemError, before long work, where `write_pairs` could not write, or would overwrite."""
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise GemError(f"--out {out}: name a .jsonl or .jsonl.gz file")
    if os.path.lexists(out):
        raise GemError(f"--out {out} is there already; remove it, or choose another --out")
    writable_parent(out)


def write_pairs(out: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a ``--pairs`` file, an object a line, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gem-pairs-") as folder:
        part = Path(folder) / out.name
        with open_text(part, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        with part.open("rb") as done:
            os.fsync(done.fileno())
        part.replace(out)


def _pair(row: Any, where: str) -> Pair:
    if (
        not isinstance(row, dict)
        or "anchor" not in row
        or not {"positive", "negative"} & row.keys()
    ):
        raise GemError(
            f"{where}: expected an object with anchor, and positive or negative, or both"
        )
    positive, negative = row.get("positive"), row.get("negative") or []
    negatives = negative if isinstance(negative, list) else [negative]
    given = [row["anchor"], *negatives, *([] if positive is None else [positive])]
    if not all(isinstance(text, str) and text.strip() for text in given):
        raise GemError(f"{where}: anchor, positive and negative must be texts that are not empty")
    return Pair(row["anchor"], positive, negatives)
