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
from gem_vllm.serving.row_values import Row, chunk, types_of

T = TypeVar("T")

TEXT_COLUMN = "text"
SAMPLED_ROWS = 1000
# A shard is found from the row of this number, or a multiple of it, that is before it.
MARK_ROWS = 4096
READ_BYTES = 1 << 20
# Characters of a CSV field: more than a model takes, less than what follows a quote without an end.
FIELD_LIMIT = 1 << 24


def json_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of JSON lines, from the first `SAMPLED_ROWS` rows.

    While one of ``names`` has only nulls or empty lists there, its type is looked for further on.
    """
    rows = _json_rows(url)
    types: dict[str, pa.DataType] = {}
    while sample := list(islice(rows, SAMPLED_ROWS)):
        for name, type_ in types_of(sample).items():
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
    rows: Iterator[Row], start: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    while some := list(islice(rows, CHUNK_ROWS)):
        yield chunk(start, some, types, text)
        start += len(some)


def _json_rows(url: str, rows: RowRange | None = None) -> Iterator[Row]:
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


def _csv_rows(url: str, rows: RowRange) -> Iterator[Row]:
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


def _text_rows(url: str, rows: RowRange) -> Iterator[Row]:
    for line in _within(_lines(url, rows.from_byte), rows):
        yield {TEXT_COLUMN: line.rstrip(b"\r\n")}, ""


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
