"""Columns keep what they hold: the types of a job's input, over rows and over files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_vllm.errors import GemError
from gem_vllm.serving.columnar import RowRange
from gem_vllm.serving.inputs import column_types, count_rows, list_files, read_rows
from gem_vllm.serving.lines import FIELD_LIMIT, SAMPLED_ROWS


def read(folder: Path, *names: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all files, and what is wrong with some."""
    files = list_files(str(folder))
    types = column_types(files, ["text", *names])
    rows, problems = [], []
    for file in files:
        for chunk in read_rows(file, RowRange(0, count_rows(file).rows), types, "text"):
            rows += pa.table(chunk.columns).to_pylist()
            problems += chunk.problems.values()
    return rows, problems


def json_lines(path: Path, values: list[Any]) -> None:
    path.write_text("\n".join(json.dumps({"text": "a", "n": value}) for value in values))


@pytest.mark.parametrize(
    ("sampled", "later", "kept"),
    [
        (1, 0.5, None),
        (1, 2.0, 2),
        ([1], [1, 2.7], None),
        ({"a": 1}, {"a": 1, "b": 2}, None),
        ({"a": 1}, {}, {"a": None}),
        (0.5, float("inf"), float("inf")),
        (None, "late", "late"),
        ([], ["late"], ["late"]),
        ({"a": None}, {"a": [7]}, {"a": [7]}),
        (None, None, None),
        ((1 << 63) + 1, 7, 7),
        (1 << 62, (1 << 63) + 1, None),
    ],
)
def test_a_json_value_is_kept_or_reported(
    sampled: Any, later: Any, kept: Any, tmp_path: Path
) -> None:
    json_lines(tmp_path / "in.jsonl", [sampled] * (2 * SAMPLED_ROWS) + [later, sampled])
    rows, problems = read(tmp_path, "n")
    assert [row["n"] for row in rows[-3:]] == [sampled, kept, sampled]
    assert len(problems) == (kept is None and later is not None)


def test_a_row_that_is_nested_too_deeply_is_a_bad_row(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "in.jsonl").write_text(f'{{"text": "a"}}\n{{"text": "b", "n": {deep}}}\n')
    assert read(tmp_path)[1] == ["JSON that is nested too deeply"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("in.jsonl", '{"text": "a"}\n'), ("in.csv", "text\na\n"), ("in.txt", "a\n")],
)
def test_a_byte_order_mark_is_no_text(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read(tmp_path) == ([{"text": b"a"}], [])


def test_a_long_csv_field(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("text\n" + "a" * 200_000 + "\n")
    assert len(read(tmp_path)[0][0]["text"]) == 200_000 < FIELD_LIMIT


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_types_are_those_of_the_first_file_with_rows(ending: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{ending}").touch()
    line = '{"text": "a", "n": "x"}\n' if ending == "jsonl" else "text,n\na,x\n"
    (tmp_path / f"b.{ending}").write_text(line)
    assert read(tmp_path, "n") == ([{"text": b"a", "n": "x"}], [])
    (tmp_path / f"b.{ending}").unlink()
    with pytest.raises(GemError, match="has no column 'text'; its columns are: none"):
        read(tmp_path)


def test_json_files_of_which_the_first_has_nulls_only(tmp_path: Path) -> None:
    json_lines(tmp_path / "a.jsonl", [None])
    json_lines(tmp_path / "b.jsonl", ["x", 1])
    rows, problems = read(tmp_path, "n")
    assert ([row["n"] for row in rows], problems) == (
        [None, "x", None],
        ["column 'n' is not string: 1"],
    )


def test_every_csv_file_has_the_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n\na,1\n")
    (tmp_path / "b.csv").write_text("text\nb\n")
    with pytest.raises(GemError, match=r"b.csv has no column 'n'; its columns are: text"):
        read(tmp_path, "n")


@pytest.mark.parametrize(
    ("first", "second", "held"),
    [
        (pa.nulls(1), pa.array(["x"]), pa.string()),
        (pa.array([1]), pa.array([0.5]), pa.float64()),
        (pa.array([1]), pa.array(["x"]), None),
    ],
)
def test_the_types_of_all_parquet_files_are_merged(
    first: pa.Array, second: pa.Array, held: pa.DataType | None, tmp_path: Path
) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": first}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"], "n": second}), tmp_path / "b.parquet")
    if held is None:
        with pytest.raises(GemError, match=r"b.parquet: column 'n' is string, .* it is int64"):
            read(tmp_path, "n")
    else:
        values = first.to_pylist() + second.to_pylist()
        assert [row["n"] for row in read(tmp_path, "n")[0]] == values
        assert column_types(list_files(str(tmp_path)), ["text", "n"])["n"] == held
