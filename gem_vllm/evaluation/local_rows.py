"""The rows of a local task's files: read, and checked, before anything runs on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemError
from gem_vllm.training.data import read_jsonl

Row = dict[str, Any]

# By fields, in this order: the first kind all of whose fields a row has.
FIELDS = {
    "STS": ("sentence1", "sentence2", "score"),
    "PairClassification": ("sentence1", "sentence2", "label"),
    "Reranking": ("query", "positive", "negative"),
    "Summarization": ("text", "human_summaries", "machine_summaries", "relevance"),
    "Classification": ("text", "label"),
}


def read_rows(file: Path) -> list[Row]:
    """The objects in a file of JSON lines; GemError where it holds none, or something else."""
    rows = []
    for where, row in read_jsonl(file):
        if not isinstance(row, dict):
            raise GemError(f"{where}: expected an object")
        rows.append(row)
    if not rows:
        raise GemError(f"{file} is empty")
    return rows


def kind_of(file: Path, rows: list[Row]) -> str:
    """The kind of task that rows are of; GemError where they are of none."""
    for kind, fields in FIELDS.items():
        if set(fields) <= rows[0].keys():
            check_rows(file, rows, fields)
            return kind
    known = "; ".join(", ".join(fields) for fields in FIELDS.values())
    raise GemError(f"{file}: a task's rows have one of these sets of fields: {known}")


def check_rows(file: Path, rows: list[Row], fields: Sequence[str]) -> None:
    """GemError for a row that lacks a field, or has a value there that is none of its kind."""
    for number, row in enumerate(rows, start=1):
        if lacks := set(fields) - row.keys():
            raise GemError(f"{file}, row {number}: lacks {', '.join(sorted(lacks))}")
        for field in fields:
            if field in _VALUES:
                is_right, what = _VALUES[field]
                if not is_right(row[field]):
                    raise GemError(f"{file}, row {number}: {field} must be {what}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_label(value: Any) -> bool:
    return _is_text(value) or _is_number(value)


def _list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("sentence1", "sentence2", "text", "query"), (_is_text, "a text")),
    **dict.fromkeys(
        ("positive", "negative", "human_summaries", "machine_summaries"),
        (_list_of(_is_text), "a list of texts"),
    ),
    "score": (_is_number, "a number"),
    "relevance": (_list_of(_is_number), "a list of numbers"),
    "label": (_is_label, "a text or a number"),
}
