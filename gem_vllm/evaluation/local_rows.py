"""The rows of a local task's files: read, and checked, before anything runs on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemError
from gem_vllm.training.data import is_number, read_jsonl

Row = dict[str, Any]
# Of a field's values: whether one is right, and what it must be.
Check = tuple[Callable[[Any], bool], str]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def _is_label(value: Any) -> bool:
    return _is_text(value) or (is_number(value) and value == int(value))


def _list_of(is_right: Callable[[Any], bool], *, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) >= least and all(map(is_right, value))
    )


_TEXT: Check = (_is_text, "a text")
_TEXTS: Check = (_list_of(_is_text), "a list of texts")
_SOME_TEXTS: Check = (_list_of(_is_text, least=1), "a list of texts, at least one")
# By fields, in this order: the first kind all of whose fields a row has.
FIELDS: dict[str, dict[str, Check]] = {
    "STS": {"sentence1": _TEXT, "sentence2": _TEXT, "score": (is_number, "a number")},
    "PairClassification": {
        "sentence1": _TEXT,
        "sentence2": _TEXT,
        "label": (lambda value: is_number(value) and value in (0, 1), "0 or 1"),
    },
    "Reranking": {"query": _TEXT, "positive": _TEXTS, "negative": _TEXTS},
    "Summarization": {
        "text": _TEXT,
        "human_summaries": _SOME_TEXTS,
        "machine_summaries": _SOME_TEXTS,
        "relevance": (_list_of(is_number), "a list of numbers"),
    },
    "Classification": {"text": _TEXT, "label": (_is_label, "a text or a whole number")},
}
# By file of a retrieval task.
RETRIEVAL_FIELDS: dict[str, dict[str, Check]] = {
    "corpus": {
        "_id": _TEXT,
        "title": (lambda value: value is None or _is_text(value), "a text"),
        "text": _TEXT,
    },
    "queries": {"_id": _TEXT, "text": _TEXT},
    "qrels": {"q": _TEXT, "d": _TEXT, "score": (_is_whole, "a whole number")},
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
        if fields.keys() <= rows[0].keys():
            check_rows(file, rows, fields)
            return kind
    known = "; ".join(", ".join(fields) for fields in FIELDS.values())
    raise GemError(f"{file}: a task's rows have one of these sets of fields: {known}")


def check_rows(file: Path, rows: list[Row], fields: Mapping[str, Check]) -> None:
    """GemError for a row that lacks a field, or has a value there that is none of its kind."""
    for number, row in enumerate(rows, start=1):
        if lacks := fields.keys() - row.keys():
            raise GemError(f"{file}, row {number}: lacks {', '.join(sorted(lacks))}")
        for field, (is_right, what) in fields.items():
            if not is_right(row[field]):
                raise GemError(f"{file}, row {number}: {field} must be {what}")


def check_relevance(file: Path, rows: list[Row]) -> None:
    """GemError for a row that has not as many scores as summaries to be scored."""
    for number, row in enumerate(rows, start=1):
        if len(row["relevance"]) != len(row["machine_summaries"]):
            raise GemError(
                f"{file}, row {number}: relevance must be as many numbers as machine_summaries "
                "has texts"
            )


def check_labels(folder: Path, rows: list[Row]) -> None:
    """GemError where some labels of a task are texts, and others numbers."""
    if len({_is_text(row["label"]) for row in rows}) > 1:
        raise GemError(f"{folder}: some labels are texts, and others numbers; make them all texts")
