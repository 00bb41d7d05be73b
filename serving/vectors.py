"""Embeddings as Arrow columns: float32, float16, int8 with a scale for each row, or bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

DTYPES = ("float32", "float16", "int8", "binary")
EMBEDDING, SCALE = "embedding", "embedding_scale"


def vector_fields(dtype: str, size: int) -> list[pa.Field]:
    """The columns that embeddings of ``size`` numbers take.

    Args:
        dtype: one of `DTYPES`. ``int8``: the embedding is `embedding` times `embedding_scale`.
            ``binary``: eight signs to a uint8, the first in the highest bit, 1 where the number
            is above 0, as numpy's packbits and sentence-transformers' ubinary.
        size: numbers in an embedding.
    """
    item = {
        "float32": pa.float32(),
        "float16": pa.float16(),
        "int8": pa.int8(),
        "binary": pa.uint8(),
    }[dtype]
    length = -(-size // 8) if dtype == "binary" else size
    fields = [pa.field(EMBEDDING, pa.list_(item, length))]
    return [*fields, pa.field(SCALE, pa.float32())] if dtype == "int8" else fields


def vector_columns(
    vectors: Sequence[np.ndarray | None], dtype: str, size: int
) -> dict[str, pa.Array]:
    """Embeddings as the columns of `vector_fields`; null where there is none.

    Args:
        vectors: float32 [size] each.
        dtype: one of `DTYPES`.
        size: numbers in an embedding.
    """
    missing = np.array([vector is None for vector in vectors], dtype=bool)
    rows: np.ndarray = np.zeros((len(vectors), size), dtype=np.float32)
    for i, vector in enumerate(vectors):
        if vector is not None:
            rows[i] = vector
    fields = vector_fields(dtype, size)
    columns = {}
    if dtype == "int8":
        scales = np.abs(rows).max(axis=1, initial=0.0) / 127
        divisors = np.where(scales > 0, scales, 1)[:, None]
        rows = np.rint(rows / divisors).astype(np.int8)
        columns[SCALE] = pa.array(scales, pa.float32(), mask=missing)
    elif dtype == "binary":
        rows = np.packbits(rows > 0, axis=1)
    else:
        rows = rows.astype(dtype)
    type_ = fields[0].type
    columns[EMBEDDING] = pa.FixedSizeListArray.from_arrays(
        pa.array(rows.reshape(-1), type_.value_type), type=type_, mask=pa.array(missing)
    )
    return {field.name: columns[field.name] for field in fields}
