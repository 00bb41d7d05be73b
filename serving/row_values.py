"""Rows of untyped values as Arrow columns: a value stays as it is, or is its row's problem."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from gem_vllm.serving.columnar import Chunk

# What Arrow raises for a value that is not of the type it is asked for.
_NOT_OF_TYPE = (pa.ArrowException, UnicodeEncodeError, OverflowError, RecursionError)

# A row's values, or none and what is wrong with it.
Row = tuple[dict[str, Any] | None, str]


def types_of(rows: list[Row]) -> dict[str, pa.DataType]:
    """The columns that rows have, in order, each with the type that Arrow sees in its values."""
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


def chunk(start: int, rows: list[Row], types: dict[str, pa.DataType], text: str) -> Chunk:
    """Rows as Arrow columns.

    Args:
        start: the first row's number in its file.
        rows: the rows.
        types: the columns to make. A value that is not of its column's type is the row's problem.
        text: the column of the texts, made of bytes.
    """
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
