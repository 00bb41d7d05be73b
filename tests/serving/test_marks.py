"""Shards are read from the middle of a file, where its format and compression allow that."""

from __future__ import annotations

import codecs
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pytest

from gem_vllm.serving import lines
from gem_vllm.serving.inputs import column_types, count_rows, list_files, read_rows
from gem_vllm.serving.plan import Plan, make_plan

ROWS = [f"{'é' * (i % 3)} text {i}" for i in range(95)]
JSON = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in ROWS)
# Of two lines each, with ends as in Windows.
QUOTED = "text,n\r\n" + "".join(f'"{row}\r\n",{i}\r\n' for i, row in enumerate(ROWS))
TEXT = "\n".join(ROWS)
# With blank lines, which are no rows.
SPACED = JSON.replace('5"}\n', '5"}\n\n')
SPACED_CSV = QUOTED.replace(",4\r\n", ",4\r\n\r\n")


@pytest.fixture(autouse=True)
def marks_every_ten_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MARK_ROWS", 10)


def plan_of(path: Path, rows_per_shard: int) -> Plan:
    files = list_files(str(path))
    return make_plan({}, files, [count_rows(file) for file in files], rows_per_shard)


def texts_of(plan: Plan) -> list[str]:
    (file,) = plan.files
    types = column_types([file], ["text"])
    return [
        value.decode().removesuffix("\r\n")
        for shard in plan.shards
        for chunk in read_rows(file, shard.rows, types, "text")
        for value in chunk.columns["text"].to_pylist()
    ]


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8], ids=["", "BOM"])
@pytest.mark.parametrize("rows_per_shard", [7, 10, 25, 100])
@pytest.mark.parametrize(
    ("suffix", "content"),
    [("jsonl", JSON), ("jsonl", SPACED), ("csv", QUOTED), ("csv", SPACED_CSV), ("txt", TEXT)],
)
def test_every_shard_begins_at_a_mark(
    suffix: str, content: str, rows_per_shard: int, start: bytes, tmp_path: Path
) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(start + content.encode())
    plan = plan_of(path, rows_per_shard)
    assert texts_of(plan) == ROWS
    for shard in plan.shards:
        assert shard.from_row == shard.start // 10 * 10
        assert bool(shard.from_byte) == (shard.start >= 10)


def test_what_is_before_a_mark_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(JSON, encoding="utf-8")
    plan = plan_of(path, 30)
    data = path.read_bytes()
    path.write_bytes(bytes(plan.shards[-1].from_byte) + data[plan.shards[-1].from_byte :])
    (file,) = plan.files
    (chunk,) = read_rows(file, plan.shards[-1].rows, {"text": pa.string()}, "text")
    assert [value.decode() for value in chunk.columns["text"].to_pylist()] == ROWS[90:]


def test_a_compressed_file_has_no_marks(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(TEXT.encode()))
    plan = plan_of(path, 30)
    assert {(shard.from_row, shard.from_byte) for shard in plan.shards} == {(0, 0)}
    assert texts_of(plan) == ROWS
