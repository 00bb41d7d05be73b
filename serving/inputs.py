"""The rows of a batch job's input, in several formats, by any fsspec URI.

Every row has a number in its file, from 0 on, whatever is wrong with it: a row that cannot be read
is a row with a problem, not one that is missing.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import fsspec
import pyarrow as pa

from gem_vllm.errors import GemError
from gem_vllm.serving import columnar, lines
from gem_vllm.serving.columnar import Chunk
from gem_vllm.serving.errors import first_line


@dataclass(frozen=True)
class Format:
    """How files of a format are read, each by its URL.

    Attributes:
        name: for messages.
        types: the columns of a file.
        count: rows of a file, bad ones included.
        read: as `read_rows`, with the URL first.
        typed: whether a column has one type, so that it is known whether it holds text.
    """

    name: str
    types: Callable[[str], dict[str, pa.DataType]]
    count: Callable[[str], int]
    read: Callable[[str, int, int, dict[str, pa.DataType], str], Iterator[Chunk]]
    typed: bool = False


_PARQUET = Format(
    "parquet", columnar.parquet_types, columnar.count_parquet, columnar.read_parquet, typed=True
)
_ARROW = Format(
    "arrow", columnar.arrow_types, columnar.count_arrow, columnar.read_arrow, typed=True
)
_JSON = Format("jsonl", lines.json_types, lines.count_lines, lines.read_json)
_CSV = Format("csv", lines.csv_types, lines.count_csv, lines.read_csv)
_TEXT = Format("text", lines.text_types, lines.count_lines, lines.read_text)
FORMATS = {
    ".parquet": _PARQUET,
    ".arrow": _ARROW,
    ".jsonl": _JSON,
    ".jsonl.gz": _JSON,
    ".csv": _CSV,
    ".csv.gz": _CSV,
    ".txt": _TEXT,
    ".txt.gz": _TEXT,
}
# What `datasets` keeps beside the Arrow files of a data set.
NO_DATA = ("dataset_info.json", "state.json", "dataset_dict.json")
# Errors of a stream that ends too early or is no gzip, and the like: of the file, not of a row.
BROKEN_FILE = (OSError, EOFError, zlib.error, pa.ArrowException, csv.Error)


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
    def format(self) -> Format:
        """By the end of its name."""
        for suffix, format_ in FORMATS.items():
            if self.url.endswith(suffix):
                return format_
        raise GemError(
            f"{self.url}: cannot read this; give files that end with {', '.join(FORMATS)}"
        )


def list_files(spec: str) -> list[InputFile]:
    """The files that ``spec`` names, sorted: a file, a folder or a glob, local or an fsspec URI.

    Raises:
        GemError: nothing there, files of several formats, or of none that can be read.
    """
    try:
        fs, path = fsspec.core.url_to_fs(spec)
        if fs.isdir(path):
            found = [p for p in fs.find(path) if _is_data(p[len(path) :])]
        else:
            found = [p for p in fs.glob(path) if fs.isfile(p)] if _is_glob(spec) else [path]
        infos = [fs.info(p) for p in sorted(found)]
    except (OSError, ValueError, ImportError) as error:
        raise GemError(f"--input {spec} cannot be read: {first_line(error)}") from error
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
    formats = {file.format.name for file in files}
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
        have = first.format.types(first.url)
    except BROKEN_FILE as error:
        raise GemError(f"{first.url} cannot be read: {first_line(error)}") from error
    for name in names:
        if name not in have:
            raise GemError(
                f"{first.url} has no column '{name}'; its columns are: {', '.join(have) or 'none'}"
            )
    if first.format.typed and not _is_text(have[names[0]]):
        raise GemError(f"{first.url}: column '{names[0]}' is {have[names[0]]}, not text")
    return {name: have[name] for name in names}


def count_rows(file: InputFile) -> int:
    """Rows of a file, bad ones included; GemError for a file that ends too early, or is no such."""
    try:
        return file.format.count(file.url)
    except BROKEN_FILE as error:
        raise GemError(f"{file.url} cannot be read: {first_line(error)}") from error


def read_rows(
    file: InputFile, start: int, stop: int, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows ``start`` to ``stop`` of a file in chunks of at most `columnar.CHUNK_ROWS`.

    Args:
        file: to read.
        start: number of the first row.
        stop: number of the row behind the last.
        types: columns to read, by name.
        text: name of the column with the text.
    """
    return file.format.read(file.url, start, stop, {**types, text: pa.large_binary()}, text)


def _is_text(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(kind(type_) for kind in (*kinds, pa.types.is_binary, pa.types.is_large_binary))


def _is_data(relative: str) -> bool:
    parts = [part for part in relative.split("/") if part]
    # As Spark and Arrow do: names that begin with "_" or "." are not data.
    return parts[-1] not in NO_DATA and not any(part.startswith(("_", ".")) for part in parts)


def _is_glob(spec: str) -> bool:
    return any(c in spec for c in "*?[")
