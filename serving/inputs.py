"""The rows of a batch job's input, in several formats, by any fsspec URI.

Every row has a number in its file, from 0 on, whatever is wrong with it: a row that cannot be read
is a row with a problem, not one that is missing.
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.utils import glob_translate

from gem_vllm.errors import GemError, first_line
from gem_vllm.serving import columnar, lines
from gem_vllm.serving.columnar import Chunk, Extent, RowRange, is_open_type, merged_type


@dataclass(frozen=True)
class Format:
    """How files of a format are read, each by its URL.

    Attributes:
        name: for messages.
        types: the columns of a file, by its URL and the names that matter.
        count: rows of a file, bad ones included, and where in it they are.
        read: as `read_rows`, with the URL first.
        headed: whether every file says what its columns are; else the first that shows it will do.
        typed: whether a column has one type, so that it is known whether it holds text.
    """

    name: str
    types: Callable[[str, Sequence[str]], dict[str, pa.DataType]]
    count: Callable[[str], Extent]
    read: Callable[[str, RowRange, dict[str, pa.DataType], str], Iterator[Chunk]]
    headed: bool = False
    typed: bool = False


_PARQUET = Format(
    "parquet", columnar.parquet_types, columnar.count_parquet, columnar.read_parquet, True, True
)
_ARROW = Format(
    "arrow", columnar.arrow_types, columnar.count_arrow, columnar.read_arrow, True, True
)
_JSON = Format("jsonl", lines.json_types, lines.count_json, lines.read_json)
_CSV = Format("csv", lines.csv_types, lines.count_csv, lines.read_csv, headed=True)
_TEXT = Format("text", lines.text_types, lines.count_text, lines.read_text)
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
# What `datasets` keeps beside the Arrow files of a data set, which STATE names.
STATE = "state.json"
NO_DATA = ("dataset_info.json", STATE, "dataset_dict.json")
# What tells a file's versions apart, by the names that file systems have for it.
MARKS = ("mtime", "ETag", "etag", "blob_id", "LastModified", "last_modified", "updated")
HEADER_READERS = 16
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
        fs.invalidate_cache()  # what is there now
        if fs.isdir(path):
            found = _data_files(fs, path)
        elif _is_glob(path) and not fs.isfile(path):
            found = [p for p in fs.glob(path) if fs.isfile(p)]
        else:
            found = [path]
        # An object store's empty object for a folder is none that holds rows.
        infos = [fs.info(p) for p in sorted(found) if not p.endswith("/")]
    except Exception as error:  # File systems have errors of their own, for no credentials say.
        raise GemError(f"--input {spec} cannot be read: {first_line(error)}") from error
    if not infos:
        raise GemError(f"--input {spec} names no file; give a file, a folder or a glob")
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    files = [
        InputFile(
            url=info["name"] if local else fs.unstrip_protocol(info["name"]),
            size=int(info["size"] or 0),
            mark=str(next((info[name] for name in MARKS if info.get(name)), "")),
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


def would_read(spec: str, url: str) -> bool:
    """Whether ``spec``, a folder or a glob, takes in the file ``url`` once that is there."""
    (fs, path), (other_fs, other) = map(fsspec.core.url_to_fs, (spec, url))
    if type(fs) is not type(other_fs):
        return False
    folder = f"{path.rstrip('/')}/"
    if other.startswith(folder) and _is_data(other[len(folder) :]):
        return True
    return _is_glob(path) and re.match(glob_translate(path), other) is not None


def column_types(files: Sequence[InputFile], names: Sequence[str]) -> dict[str, pa.DataType]:
    """The Arrow type of each column, over all files; of JSON lines, from the first rows.

    Args:
        files: of one format.
        names: of the columns, that of the text first.

    Raises:
        GemError: a file lacks a column, has it with a type that does not go with that of the files
            before, has no text in that of the text, or cannot be read.
    """
    headed = files[0].format.headed
    types: dict[str, pa.DataType] = {}
    with ThreadPoolExecutor(HEADER_READERS) as pool:
        of_files = (pool.map if headed else map)(lambda file: _types_of_file(file, names), files)
        for file, have in zip(files, of_files, strict=True):
            # A file without a line has no columns, and no rows that would want them.
            if have:
                _add_types(types, file, have, names)
            if types and not headed and not any(map(is_open_type, types.values())):
                break
    if not types:
        raise GemError(f"{files[0].url} has no column '{names[0]}'; its columns are: none")
    if files[0].format.typed and pa.types.is_null(types[names[0]]):
        raise GemError(f"{files[0].url}: column '{names[0]}' is null, not text")
    return types


def _types_of_file(file: InputFile, names: Sequence[str]) -> dict[str, pa.DataType]:
    try:
        return file.format.types(file.url, names)
    except BROKEN_FILE as error:
        raise GemError(f"{file.url} cannot be read: {first_line(error)}") from error


def _add_types(
    types: dict[str, pa.DataType],
    file: InputFile,
    have: dict[str, pa.DataType],
    names: Sequence[str],
) -> None:
    """Widen ``types`` by what ``file`` has."""
    for name in names:
        known, type_ = types.get(name, pa.null()), have.get(name)
        if type_ is None:
            if name in types and not file.format.headed:
                continue
            raise GemError(f"{file.url} has no column '{name}'; its columns are: {', '.join(have)}")
        if file.format.typed and name == names[0] and not (_is_text(type_) or type_ == pa.null()):
            raise GemError(f"{file.url}: column '{name}' is {type_}, not text")
        merged = merged_type(known, type_)
        if merged is None and file.format.typed:
            raise GemError(
                f"{file.url}: column '{name}' is {type_}, in the files before it is {known}; give "
                "files that have one type for it"
            )
        # Of JSON lines, a value of another type is its row's problem.
        types[name] = known if merged is None else merged


def count_rows(file: InputFile) -> Extent:
    """The rows of a file; GemError for a file that ends too early, or is none of its format."""
    try:
        return file.format.count(file.url)
    except BROKEN_FILE as error:
        raise GemError(f"{file.url} cannot be read: {first_line(error)}") from error


def read_rows(
    file: InputFile, rows: RowRange, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows of a file in chunks of at most `columnar.CHUNK_ROWS`.

    Args:
        file: to read.
        rows: which.
        types: columns to read, by name.
        text: name of the column with the text.
    """
    return file.format.read(file.url, rows, {**types, text: pa.large_binary()}, text)


def _is_text(type_: pa.DataType) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(kind(type_) for kind in (*kinds, pa.types.is_binary, pa.types.is_large_binary))


def _data_files(fs: Any, folder: str) -> list[str]:
    """The files in ``folder`` that hold rows; of a data set that was saved, those it names."""
    found = [path for path in fs.find(folder) if not path.endswith("/")]
    saved = {}
    for path in found:
        parent, _, name = path.rpartition("/")
        if name == STATE and "_data_files" in (state := json.loads(fs.cat_file(path))):
            saved[parent] = {file["filename"] for file in state["_data_files"]}

    def is_data(path: str) -> bool:
        parent, _, name = path.rpartition("/")
        return name in saved[parent] if parent in saved else _is_data(path[len(folder) :])

    return [path for path in found if is_data(path)]


def _is_data(relative: str) -> bool:
    parts = [part for part in relative.split("/") if part]
    # As Spark and Arrow do: names that begin with "_" or "." are not data. Nor are results that
    # `datasets` keeps beside the files they are made from.
    cached = parts[-1].startswith("cache-") and parts[-1].endswith(".arrow")
    hidden = any(part.startswith(("_", ".")) for part in parts)
    return not (parts[-1] in NO_DATA or cached or hidden)


def _is_glob(spec: str) -> bool:
    return any(c in spec for c in "*?[")
