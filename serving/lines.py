"""Formats of one row after the other: JSON lines, CSV and plain text, also compressed (.gz).

A row that cannot be read is a row with a problem, not one that is missing. A blank line is a row of
plain text alone: of JSON lines and CSV it is none.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.spec import AbstractBufferedFile

from gem_vllm.errors import first_line
from gem_vllm.serving.columnar import (
    CHUNK_ROWS,
    Chunk,
    Extent,
    RowRange,
    is_open_type,
    merged_type,
)

T = TypeVar("T")

TEXT_COLUMN = "text"
SAMPLED_ROWS = 1000
# A shard is found from the row of this number, or a multiple of it, that is before it.
MARK_ROWS = 4096
READ_BYTES = 1 << 20
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
    rows = _json_rows(url)
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


def count_json(url: str) -> Extent:
    """Rows of a file of JSON lines."""
    read = _Read()
    return _extent(url, _not_blank(_lines(url, read=read)), read)


def count_text(url: str) -> Extent:
    """Rows of a text file."""
    read = _Read()
    return _extent(url, _lines(url, read=read), read)


def count_csv(url: str) -> Extent:
    """Rows of a CSV file, without its first line."""
    with _byte_stream(url) as stream:
        is_marked = stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    read = _Read(len(codecs.BOM_UTF8) if is_marked else 0)
    with _text_stream(url) as lines:
        rows = _csv_reader(_noted(lines, read))
        next(rows, None)
        return _extent(url, filter(None, rows), read)


def _extent(url: str, rows: Iterable[Any], read: _Read) -> Extent:
    """Of ``rows``, whose bytes are noted as they are gone through."""
    marks: list[int] = []
    count = 0
    for count, _ in enumerate(rows, start=1):
        if count % MARK_ROWS == 0:
            marks.append(read.bytes)
    # Decompressed bytes are no place in a file.
    return Extent(count, () if url.endswith(".gz") else tuple(marks), MARK_ROWS)


def read_json(
    url: str, rows: RowRange, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows of JSON lines."""
    return _chunks(_json_rows(url, rows), rows.start, types, text)


def read_csv(url: str, rows: RowRange, types: dict[str, pa.DataType], text: str) -> Iterator[Chunk]:
    """Rows of a CSV file."""
    return _chunks(_csv_rows(url, rows), rows.start, types, text)


def read_text(
    url: str, rows: RowRange, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows of a text file."""
    return _chunks(_text_rows(url, rows), rows.start, types, text)


def _chunks(
    rows: Iterator[_Row], start: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        yield _chunk(start, some, types, text)
        start += len(some)


def _json_rows(url: str, rows: RowRange | None = None) -> Iterator[_Row]:
    for line in _lines_with_rows(url, rows):
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


def _csv_rows(url: str, rows: RowRange) -> Iterator[_Row]:
    with _text_stream(url) as stream:
        names = next(_csv_reader(stream), [])
    with _text_stream(url, rows.from_byte) as stream:
        reader = _csv_reader(stream)
        if not rows.from_byte:
            next(reader, None)
        for fields in _within(filter(None, reader), rows):
            if len(fields) == len(names):
                yield dict(zip(names, fields, strict=True)), ""
            else:
                yield None, f"{len(fields)} fields, the first line has {len(names)}"


def _text_rows(url: str, rows: RowRange) -> Iterator[_Row]:
    for line in _within(_lines(url, rows.from_byte), rows):
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


def _csv_reader(stream: Iterable[str]) -> Iterator[list[str]]:
    csv.field_size_limit(FIELD_LIMIT)
    return csv.reader(stream)


@dataclass
class _Read:
    """How many bytes of a file have been gone through."""

    bytes: int = 0


def _lines_with_rows(url: str, rows: RowRange | None) -> Iterator[bytes]:
    """The lines of JSON's rows; None for all of them."""
    if rows is None:
        return _not_blank(_lines(url))
    return _within(_not_blank(_lines(url, rows.from_byte)), rows)


def _not_blank(lines: Iterable[bytes]) -> Iterator[bytes]:
    return (line for line in lines if not line.isspace())


def _within(from_mark: Iterable[T], rows: RowRange) -> Iterator[T]:
    """Of what is in a file from the mark before ``rows`` on, those."""
    return islice(from_mark, rows.start - rows.from_row, rows.stop - rows.from_row)


def _lines(url: str, from_byte: int = 0, read: _Read | None = None) -> Iterator[bytes]:
    """The lines of a file, without the mark that some editors begin UTF-8 with."""
    read = read or _Read()
    with _byte_stream(url) as stream:
        stream.seek(from_byte)
        for line in stream:
            at_start = from_byte == read.bytes == 0
            read.bytes += len(line)
            if line := line.removeprefix(codecs.BOM_UTF8) if at_start else line:
                yield line


def _noted(stream: Iterable[str], read: _Read) -> Iterator[str]:
    """The lines of a `_text_stream`, whose bytes are noted."""
    for line in stream:
        read.bytes += len(line.encode("utf-8", "surrogateescape"))
        yield line


def _byte_stream(url: str) -> IO[bytes]:
    stream = fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None).open()
    if isinstance(stream, AbstractBufferedFile):
        # Whose own lines each cost a copy of a whole block: 50 MiB of an object in S3.
        return io.BufferedReader(stream, READ_BYTES)
    return stream


def _text_stream(url: str, from_byte: int = 0) -> IO[str]:
    stream = _byte_stream(url)
    stream.seek(from_byte)
    encoding = "utf-8" if from_byte else "utf-8-sig"
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")
