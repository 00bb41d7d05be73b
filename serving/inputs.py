"""The rows of a batch job's input: Parquet, JSON lines, CSV or plain text, by any fsspec URI.

Every row has a number in its file, from 0 on, whatever is wrong with it: a row that cannot be read
is a row with a problem, not one that is missing.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from gem_vllm.errors import GemError

FORMATS = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".txt": "text",
    ".txt.gz": "text",
}
TEXT_COLUMN = "text"
CHUNK_ROWS = 512
SAMPLED_ROWS = 1000


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    Attributes:
        url: with its protocol, where it is not local.
        size: bytes.
        mark: what changes when the content does: a time of modification or an ETag.
    """

    url: str
    size: int
    mark: str

    @property
    def format(self) -> str:
        """One of the values of `FORMATS`."""
        return _format_of(self.url)


@dataclass
class Chunk:
    """Some rows of a file, one after the other.

    Attributes:
        start: number of the first row in its file.
        columns: name to Arrow array, all of one length; text as `large_binary`.
        problems: index in the chunk to what is wrong with the row.
    """

    start: int
    columns: dict[str, pa.Array]
    problems: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def list_files(spec: str) -> list[InputFile]:
    """The files that ``spec`` names, sorted: a file, a folder or a glob, local or an fsspec URI.

    Raises:
        GemError: nothing there, files of several formats, or of none that can be read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(spec)
        if fs.isdir(path):
            # As Spark and Arrow do: names that begin with "_" or "." are not data.
            found = [p for p in fs.find(path) if not _hidden(p[len(path) :])]
        else:
            found = [p for p in fs.glob(path) if fs.isfile(p)] if _is_glob(spec) else [path]
        infos = [fs.info(p) for p in sorted(found)]
    except (OSError, ValueError, ImportError) as error:
        raise GemError(f"--input {spec} cannot be read: {_first_line(error)}") from error
    if not infos:
        raise GemError(f"--input {spec} names no file; give a file, a folder or a glob")
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    files = [
        InputFile(
            url=info["name"] if local else fs.unstrip_protocol(info["name"]),
            size=int(info["size"] or 0),
            mark=str(info.get("mtime") or info.get("ETag") or info.get("LastModified") or ""),
        )
        for info in infos
    ]
    formats = {file.format for file in files}
    if len(formats) > 1:
        raise GemError(
            f"--input {spec} holds files of several formats ({', '.join(sorted(formats))}); "
            "give one of them, for example by a glob"
        )
    return files


def column_types(files: Sequence[InputFile], names: Sequence[str]) -> dict[str, pa.DataType]:
    """The Arrow type of each column, from the first file; of JSON lines, from its first rows.

    Args:
        files: of one format.
        names: of the columns, that of the text first.

    Raises:
        GemError: a column is missing, the text's is of another type, or the first file cannot be
            read.
    """
    first = files[0]
    try:
        if first.format == "parquet":
            with fsspec.open(first.url, "rb") as stream:
                schema = pq.read_schema(stream)
            have = {name: _plain(schema.field(name).type) for name in schema.names}
        elif first.format == "jsonl":
            have = _sampled_types(first)
        elif first.format == "csv":
            with _text_stream(first.url) as stream:
                have = dict.fromkeys(next(csv.reader(stream), []), pa.string())
        else:
            have = {TEXT_COLUMN: pa.string()}
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise GemError(f"{first.url} cannot be read: {_first_line(error)}") from error
    for name in names:
        if name not in have:
            raise GemError(
                f"{first.url} has no column '{name}'; its columns are: {', '.join(have) or 'none'}"
            )
    if first.format == "parquet" and not _is_text(have[names[0]]):
        raise GemError(f"{first.url}: column '{names[0]}' is {have[names[0]]}, not text")
    return {name: have[name] for name in names}


def count_rows(file: InputFile) -> int:
    """Rows of a file, bad ones included."""
    if file.format == "parquet":
        with fsspec.open(file.url, "rb") as stream:
            return int(pq.ParquetFile(stream).metadata.num_rows)
    if file.format == "csv":
        with _text_stream(file.url) as stream:
            return max(0, sum(1 for _ in csv.reader(stream)) - 1)
    with _byte_stream(file.url) as stream:
        return sum(1 for _ in stream)


def read_rows(
    file: InputFile, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a file in chunks of at most `CHUNK_ROWS`.

    Args:
        file: to read.
        start: number of the first row.
        stop: number of the row behind the last.
        types: columns to read, by name.
        text: name of the column with the text.
    """
    types = {**types, text: pa.large_binary()}
    if file.format == "parquet":
        yield from _read_parquet(file.url, start, stop, types)
        return
    rows = {"jsonl": _json_rows, "csv": _csv_rows, "text": _lines}[file.format](file.url)
    rows = islice(rows, start, stop)
    while some := list(islice(rows, CHUNK_ROWS)):
        yield _chunk(start, some, types, text)
        start += len(some)


def _read_parquet(
    url: str, start: int, stop: int, types: dict[str, pa.DataType]
) -> Iterator[Chunk]:
    with fsspec.open(url, "rb") as stream:
        file = pq.ParquetFile(stream)
        first = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                at = first
                for batch in file.iter_batches(CHUNK_ROWS, [group], columns=list(types)):
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    if low < high:
                        part = batch.slice(low, high - low)
                        columns = {n: part.column(n).cast(t) for n, t in types.items()}
                        yield Chunk(at + low, columns)
                    at += len(batch)
            first += rows


_Row = tuple[dict[str, Any] | None, str]


def _json_rows(url: str) -> Iterator[_Row]:
    with _byte_stream(url) as stream:
        for line in stream:
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                yield None, "invalid UTF-8"
            except ValueError as error:
                yield None, f"not JSON: {_first_line(error)}"
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


def _lines(url: str) -> Iterator[_Row]:
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


def _sampled_types(file: InputFile) -> dict[str, pa.DataType]:
    columns: dict[str, list[Any]] = {}
    for row, _ in islice(_json_rows(file.url), SAMPLED_ROWS):
        for name, value in (row or {}).items():
            columns.setdefault(name, []).append(value)
    types = {}
    for name, values in columns.items():
        try:
            types[name] = pa.infer_type(values)
        except (pa.ArrowException, UnicodeEncodeError):
            types[name] = pa.string()
    return types


def _plain(type_: pa.DataType) -> pa.DataType:
    return type_.value_type if pa.types.is_dictionary(type_) else type_


def _is_text(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(kind(type_) for kind in (*kinds, pa.types.is_binary, pa.types.is_large_binary))


def _byte_stream(url: str) -> IO[bytes]:
    return fsspec.open(url, "rb", compression="gzip" if url.endswith(".gz") else None).open()


def _text_stream(url: str) -> IO[str]:
    return io.TextIOWrapper(_byte_stream(url), "utf-8", errors="surrogateescape", newline="")


def _format_of(url: str) -> str:
    for suffix, name in FORMATS.items():
        if url.endswith(suffix):
            return name
    raise GemError(f"{url}: cannot read this; give files that end with {', '.join(FORMATS)}")


def _hidden(relative: str) -> bool:
    return any(part.startswith(("_", ".")) for part in relative.split("/") if part)


def _is_glob(spec: str) -> bool:
    return any(c in spec for c in "*?[")


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


# Errors of a stream that ends too early or is no gzip: of the file, not of a row.
BROKEN_FILE = (OSError, EOFError, gzip.BadGzipFile, pa.ArrowException, csv.Error)
