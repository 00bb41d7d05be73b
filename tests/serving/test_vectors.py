"""Vectors come back from the columns they are written to."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from gem_vllm.serving.vectors import EMBEDDING, SCALE, vector_columns, vector_fields

ROWS = np.random.default_rng(0).normal(size=(20, 37)).astype(np.float32)


def columns(dtype: str, vectors: list[np.ndarray | None]) -> dict[str, pa.Array]:
    made = vector_columns(vectors, dtype, 37)
    assert {name: array.type for name, array in made.items()} == {
        field.name: field.type for field in vector_fields(dtype, 37)
    }
    return made


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 2e-3)])
def test_floats(dtype: str, error: float) -> None:
    back = np.stack(columns(dtype, list(ROWS))[EMBEDDING].to_pylist())
    np.testing.assert_allclose(back, ROWS, atol=error, rtol=0)


def test_int8_with_its_scale() -> None:
    made = columns("int8", [*ROWS, np.zeros(37, dtype=np.float32)])
    scales = np.array(made[SCALE].to_pylist())
    back = np.stack(made[EMBEDDING].to_pylist()) * scales[:, None]
    np.testing.assert_allclose(back[:-1], ROWS, atol=scales.max() / 2 + 1e-6)
    assert not back[-1].any()


def test_bits_are_signs_first_in_the_highest_bit() -> None:
    bits = np.array(columns("binary", list(ROWS))[EMBEDDING].to_pylist(), dtype=np.uint8)
    assert bits.shape == (20, 5)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1)[:, :37], ROWS > 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "binary"])
def test_null_where_there_is_no_vector(dtype: str) -> None:
    for array in columns(dtype, [None, ROWS[0], None]).values():
        assert [value is None for value in array.to_pylist()] == [True, False, True]
    for array in columns(dtype, []).values():
        assert len(array) == 0
