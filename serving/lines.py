"""Formats of one row after the other: JSON lines, CSV and plain text, also compressed (.gz).

A row that cannot be read is a row with a problem, not one that is missing.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from itertools import islice
from typing import IO, Any

import fsspec
import pyarrow as pa

from gem_vllm.serving.columnar import CHUNK_ROWS, Chunk
from gem_vllm.serving.errors import first_line

TEXT_COLUMN = "text"
SAMPLED_ROWS = 1000

# A row's values, or none and what is wrong with it.
_Row = tuple[dict[str, Any] | None, str]


def json_types(url: str) -> dict[str, pa.DataType]:
    """The columns of JSON lines, from the first `SAMPLED_ROWS` rows."""
    columns: dict[str, list[Any]] = {}
    for row, _ in islice(_json_rows(url), SAMPLED_ROWS):
        for name, value in (row or {}).items():
            columns.setdefault(name, []).append(value)
    types = {}
    for name, values in columns.items():
        try:
            types[name] = pa.infer_type(values)
        except (pa.ArrowException, UnicodeEncodeError):
            types[name] = pa.string()
    return types


def csv_types(url: str) -> dict[str, pa.DataType]:
    """The columns of a CSV file, which its first line names: all text."""
    with _text_stream(url) as stream:
        return dict.fromkeys(next(csv.reader(stream), []), pa.string())


def text_types(url: str) -> dict[str, pa.DataType]:
    """The one column of a text file."""
    return {TEXT_COLUMN: pa.string()}


def count_lines(url: str) -> int:
    """Rows of a file of JSON lines or text."""
    with _byte_stream(url) as stream:
        return sum(1 for _ in stream)


def count_csv(url: str) -> int:
    """Rows of a CSV file, without its first line."""
    with _text_stream(url) as stream:
        return max(0, sum(1 for _ in csv.reader(stream)) - 1)


def read_json(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of JSON lines."""
    return _chunks(_json_rows(url), start, stop, types, text)


def read_csv(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a CSV file."""
    return _chunks(_csv_rows(url), start, stop, types, text)


def read_text(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a text file."""
    return _chunks(_text_rows(url), start, stop, types, text)


def _chunks(
    rows: Iterator[_Row], start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    rows = islice(rows, start, stop)
    while some := list(islice(rows, CHUNK_ROWS)):
        yield _chunk(start, some, types, text)
        start += len(some)


def _json_rows(url: str) -> Iterator[_Row]:
    with _byte_stream(url) as stream:
        for line in stream:
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield None, "invalid UTF-8"
            except ValueError as error:
                yield None, f"not JSON: {first_line(error)}"
            else:
                yield (row, "") if isinstance(row, dict) else (None, "not a JSON object")


def _csv_rows(url: str) -> Iterator[_Row]:
    with _text_stream(url) as stream:
        reader = csv.reader(stream)
        names = next(reader, [])
        for fields in reader:
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True)), ""
            else:
                yield None, f"{len(fields)} fields, the first line has {len(names)}"


def _text_rows(url: str) -> Iterator[_Row]:
    with _byte_stream(url) as stream:
        for line in stream:
            yield {TEXT_COLUMN: line.rstrip(b"\r\n")}, ""


def _chunk(start: int, rows: list[_Row], types: dict[str, pa.DataType], text: str) -> Chunk:
    problems = {i: problem for i, (_, problem) in enumerate(rows) if problem}
    values = {name: [None if row is None else row.get(name) for row, _ in rows] for name in types}
    values[text] = [_text_bytes(v, i, problems) for i, v in enumerate(values[text])]
    columns = {}
    for name, type_ in types.items():
        try:
            columns[name] = pa.array(values[name], type_)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            columns[name] = _array_of_good(values[name], name, type_, problems)
    return Chunk(start, columns, problems)


def _text_bytes(value: Any, i: int, problems: dict[int, str]) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        problems.setdefault(i, f"the text is {type(value).__name__}, not a string")
        return None
    # What is no UTF-8 (of CSV) or has half a surrogate pair (of JSON) is found out later, as bytes.
    return value.encode("utf-8", "surrogatepass")


def _array_of_good(
    values: list[Any], name: str, type_: pa.DataType, problems: dict[int, str]
) -> pa.Array:
    good: list[Any] = []
    for i, value in enumerate(values):
        try:
            pa.array([value], type_)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            problems.setdefault(i, f"column '{name}' is not {type_}: {value!r:.80}")
            value = None
        good.append(value)
    return pa.array(good, type_)


def _byte_stream(url: str) -> IO[bytes]:
    return fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None).open()


def _text_stream(url: str) -> IO[str]:
    return io.TextIOWrapper(_byte_stream(url), "utf-8", errors="surrogateescape", newline="")
