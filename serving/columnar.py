"""Formats of columns: Parquet, and the Arrow streams that Hugging Face's `datasets` keeps.

Their readers are called as those of `lines`, but treat the column with the text as any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

CHUNK_ROWS = 512


@dataclass(frozen=True)
class Extent:
    """What counting a file's rows tells.

    Attributes:
        rows: bad ones included.
        marks: byte at which row ``mark_rows`` begins, and the one twice as far, and so on; none
            where a file cannot be read from its middle.
        mark_rows: from one mark to the next.
    """

    rows: int
    marks: tuple[int, ...] = ()
    mark_rows: int = 1


@dataclass(frozen=True)
class RowRange:
    """Rows ``start`` to ``stop`` of a file, which are found from ``from_row``, at ``from_byte``."""

    start: int
    stop: int
    from_row: int = 0
    from_byte: int = 0


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


def merged_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of both; None where there is none."""
    schemas = [pa.schema({"": type_}) for type_ in (one, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None


def is_open_type(type_: pa.DataType) -> bool:
    """Whether it is of nulls, or lists or structs of such: of values that did not show a type."""
    if pa.types.is_null(type_):
        return True
    inner = [type_.field(i).type for i in range(type_.num_fields)]
    return any(map(is_open_type, inner)) or (pa.types.is_struct(type_) and not inner)


def parquet_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of a Parquet file."""
    with fsspec.open(url, "rb") as stream:
        return _plain_types(pq.read_schema(stream))


def arrow_types(url: str, names: Sequence[str]) -> dict[str, pa.DataType]:
    """The columns of an Arrow stream."""
    with _arrow_reader(url) as reader:
        return _plain_types(reader.schema)


def count_parquet(url: str) -> Extent:
    """Rows of a Parquet file."""
    with fsspec.open(url, "rb") as stream:
        return Extent(int(pq.ParquetFile(stream).metadata.num_rows))


def count_arrow(url: str) -> Extent:
    """Rows of an Arrow stream, which has no index: it is gone through."""
    with _arrow_reader(url) as reader:
        return Extent(sum(len(batch) for batch in reader))


def read_parquet(
    url: str, rows: RowRange, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows of a Parquet file; of its row groups, only those that have some of them are read."""
    with fsspec.open(url, "rb") as stream:
        file = pq.ParquetFile(stream)
        first = 0
        for group in range(file.metadata.num_row_groups):
            behind = first + file.metadata.row_group(group).num_rows
            if first < rows.stop and behind > rows.start:
                batches = file.iter_batches(CHUNK_ROWS, [group], columns=list(types))
                yield from _chunks(batches, first, rows, types)
            first = behind


def read_arrow(
    url: str, rows: RowRange, types: dict[str, pa.DataType], text: str
) -> Iterator[Chunk]:
    """Rows of an Arrow stream, a record batch at a time."""
    with _arrow_reader(url) as reader:
        yield from _chunks(reader, 0, rows, types)


def _chunks(
    batches: Iterable[pa.RecordBatch], at: int, rows: RowRange, types: dict[str, pa.DataType]
) -> Iterator[Chunk]:
    """What ``batches``, of which the first begins with row ``at``, have of the rows."""
    for batch in batches:
        if missing := types.keys() - set(batch.schema.names):
            raise pa.ArrowInvalid(f"it has no column '{min(missing)}'")
        for low in range(max(rows.start - at, 0), min(rows.stop - at, len(batch)), CHUNK_ROWS):
            part = batch.slice(low, min(CHUNK_ROWS, rows.stop - at - low))
            yield Chunk(at + low, {n: part.column(n).cast(t) for n, t in types.items()})
        at += len(batch)
        if at >= rows.stop:
            return


@contextmanager
def _arrow_reader(url: str) -> Iterator[pa.RecordBatchReader]:
    fs, path = fsspec.core.url_to_fs(url)
    local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
    # Of a mapped file, the batches that are passed over cost nothing.
    with pa.memory_map(path) if local else fs.open(path, "rb") as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowException as error:
            raise pa.ArrowInvalid("it is not an Arrow stream, as `datasets` writes it") from error
        yield reader


def _plain_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    return {
        field.name: field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        for field in schema
    }
