"""What a row becomes in a job's output: an id, kept columns and a vector, or an error."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from gem_vllm.serving.columnar import Chunk
from gem_vllm.serving.inputs import InputFile
from gem_vllm.serving.options import GENERATED, ID, EmbedOptions
from gem_vllm.serving.vectors import vector_fields

ERROR_SCHEMA = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), ("id", pa.string()), ("reason", pa.string())]
)


def make_schema(
    options: EmbedOptions, types: dict[str, pa.DataType], size: int, bound: dict[str, Any]
) -> pa.Schema:
    """Of the job's files.

    Args:
        options: of the job.
        types: the input's columns, by name.
        size: numbers in an embedding.
        bound: what the job is bound to, for the files' metadata.
    """
    types = {**types, options.text_column: pa.string()}
    id_type = pa.string() if options.id_column is None else types[options.id_column]
    fields = [
        pa.field(ID, id_type),
        *(pa.field(name, types[name]) for name in options.keep),
        *vector_fields(options.dtype, size),
    ]
    if options.generate is not None:
        fields.append(pa.field(GENERATED, pa.string()))
    metadata = {"gem.checkpoint_sha256": bound["checkpoint"], "gem.dtype": options.dtype}
    return pa.schema(fields, metadata)


def row_ids(chunk: Chunk, file: InputFile, options: EmbedOptions) -> pa.Array:
    """The ids of a chunk's rows: a column of the input, or each row's file and number."""
    if options.id_column is None:
        rows = range(chunk.start, chunk.start + len(chunk))
        return pa.array([f"{file.url}:{row}" for row in rows], pa.string())
    if options.id_column == options.text_column:
        return strings(chunk, options.text_column)
    return chunk.columns[options.id_column]


def problem_of(value: bytes | None) -> str | None:
    """What is wrong with a text, as far as is seen without an engine; None for nothing."""
    if value is None:
        return "the text is null"
    if not value:
        return "the text is empty"
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid UTF-8"
    return None


def strings(chunk: Chunk, name: str) -> pa.Array:
    """A column of bytes as strings, null where they are no UTF-8."""
    values = chunk.columns[name].to_pylist()
    return pa.array(
        [None if v is None or problem_of(v) == "invalid UTF-8" else v.decode() for v in values],
        pa.string(),
    )
