"""Formats of one row after the other: JSON lines, CSV and plain text, also compressed (.gz).

A row that cannot be read is a row with a problem, not one that is missing.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import IO, Any

import fsspec
import pyarrow as pa

from gem_vllm.serving.columnar import CHUNK_ROWS, Chunk, is_open_type, merged_type
from gem_vllm.serving.errors import first_line

TEXT_COLUMN = "text"
SAMPLED_ROWS = 1000
# Characters of a CSV field: more than a model takes, less than what follows a quote without an end.
FIELD_LIMIT = 1 << 24
# What Arrow raises for a value that is not of the type it is asked for.
_NOT_OF_TYPE = (pa.ArrowException, UnicodeEncodeError, OverflowError, RecursionError)

# A row's values, or none and what is wrong with it.
_Row = tuple[dict[str, Any] | None, str]


def json_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of JSON lines, from the first `SAMPLED_ROWS` rows.

    While one of ``names`` has only nulls or empty lists there, its type is looked for further on.
    """
    rows = _json_rows(url, 0, None)
    types: dict[str, pa.DataType] = {}
    while sample := list(islice(rows, SAMPLED_ROWS)):
        for name, type_ in _types_of(sample).items():
            if name not in types or is_open_type(types[name]):
                types[name] = merged_type(types.get(name, pa.null()), type_) or type_
        if not any(name in types and is_open_type(types[name]) for name in names):
            break
    return types


def csv_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of a CSV file, which its first line names: all text."""
    with _text_stream(url) as stream:
        return dict.fromkeys(next(_csv_reader(stream), []), pa.string())


def text_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The one column of a text file."""
    return {TEXT_COLUMN: pa.string()}


def count_lines(url: str) -> int:
    """Rows of a file of JSON lines or text."""
    return sum(1 for _ in _lines(url))


def count_csv(url: str) -> int:
    """Rows of a CSV file, without its first line."""
    with _text_stream(url) as stream:
        return max(0, sum(1 for _ in _csv_reader(stream)) - 1)


def read_json(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of JSON lines."""
    return _chunks(_json_rows(url, start, stop), start, types, text)


def read_csv(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a CSV file."""
    return _chunks(_csv_rows(url, start, stop), start, types, text)


def read_text(
    url: str, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a text file."""
    return _chunks(_text_rows(url, start, stop), start, types, text)


def _chunks(
    rows: Iterator[_Row], start: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        yield _chunk(start, some, types, text)
        start += len(some)


def _json_rows(url: str, start: int, stop: int | None) -> Iterator[_Row]:
    for line in islice(_lines(url), start, stop):
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            yield None, "invalid UTF-8"
        except ValueError as error:
            yield None, f"not JSON: {first_line(error)}"
        except RecursionError:
            yield None, "JSON that is nested too deeply"
        else:
            yield (row, "") if isinstance(row, dict) else (None, "not a JSON object")


def _csv_rows(url: str, start: int, stop: int) -> Iterator[_Row]:
    with _text_stream(url) as stream:
        reader = _csv_reader(stream)
        names = next(reader, [])
        for fields in islice(reader, start, stop):
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True)), ""
            else:
                yield None, f"{len(fields)} fields, the first line has {len(names)}"


def _text_rows(url: str, start: int, stop: int) -> Iterator[_Row]:
    for line in islice(_lines(url), start, stop):
        yield {TEXT_COLUMN: line.rstrip(b"\r\n")}, ""


def _types_of(rows: list[_Row]) -> dict[str, pa.DataType]:
    columns: dict[str, list[Any]] = {}
    for row, _ in rows:
        for name, value in (row or {}).items():
            columns.setdefault(name, []).append(value)
    return {name: _type_of(values) for name, values in columns.items()}


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        type_ = pa.infer_type(values)
    except _NOT_OF_TYPE:
        return pa.string()
    if pa.types.is_int64(type_):
        # Arrow says so of any integers: of hashes, half would not fit.
        numbers = [value for value in values if isinstance(value, int)]
        if min(numbers) >= 0 and max(numbers) >= 1 << 63:
            return pa.uint64()
    return type_


def _chunk(start: int, rows: list[_Row], types: dict[str, pa.DataType], text: str) -> Chunk:
    problems = {i: problem for i, (_, problem) in enumerate(rows) if problem}
    values = {name: [None if row is None else row.get(name) for row, _ in rows] for name in types}
    values[text] = [_text_bytes(v, i, problems) for i, v in enumerate(values[text])]
    columns = {}
    for name, type_ in types.items():
        try:
            columns[name] = _exact_array(values[name], type_)
        except _NOT_OF_TYPE:
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
            _exact_array([value], type_)
        except _NOT_OF_TYPE:
            problems.setdefault(i, f"column '{name}' is not {type_}: {value!r:.80}")
            value = None
        good.append(value)
    return pa.array(good, type_)


def _exact_array(values: list[Any], type_: pa.DataType) -> pa.Array:
    """Of these values, where `pa.array` makes 0 of 0.5 and leaves out keys that a struct lacks."""
    array = pa.array(values, type_)
    held = array.to_pylist()
    if held != values and not all(map(_same, values, held)):
        raise pa.ArrowInvalid(f"not {type_}")
    return array


def _same(value: Any, held: Any) -> bool:
    if isinstance(value, dict) and isinstance(held, dict):
        # A key that a row does not have is null.
        return value.keys() <= held.keys() and all(_same(value.get(k), v) for k, v in held.items())
    if isinstance(value, list) and isinstance(held, list):
        return len(value) == len(held) and all(map(_same, value, held))
    return bool(value == held or (value != value and held != held))


def _csv_reader(stream: IO[str]) -> Iterator[list[str]]:
    csv.field_size_limit(FIELD_LIMIT)
    return csv.reader(stream)


def _lines(url: str) -> Iterator[bytes]:
    """The lines of a file, without the mark that some editors begin UTF-8 with."""
    with _byte_stream(url) as stream:
        if first := stream.readline().removeprefix(codecs.BOM_UTF8):
            yield first
        yield from stream


def _byte_stream(url: str) -> IO[bytes]:
    return fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None).open()


def _text_stream(url: str) -> IO[str]:
    return io.TextIOWrapper(_byte_stream(url), "utf-8-sig", errors="surrogateescape", newline="")
