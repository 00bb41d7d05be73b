"""Hard negatives from the vectors of a batch job."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gem_vllm import cli
from gem_vllm.errors import GemError
from gem_vllm.serving.vectors import vector_columns
from gem_vllm.training.mining import MineOptions, mine
from gem_vllm.training.options import flag
from gem_vllm.training.pairs import PairSource

COUNT, SIZE = 90, 8


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    """Ninety texts over two files, on an arc: those with near numbers are near; one has none.

    Their vectors' lengths say nothing, and are from 3 to 24.
    """
    angles = np.linspace(0.0, 2.0, COUNT)
    angles += 0.02 * angles**2  # the two neighbours on either side are not equally near
    circle = np.zeros((COUNT, SIZE), dtype=np.float32)
    circle[:, 0], circle[:, 1] = 3 * np.cos(angles), 3 * np.sin(angles)
    circle *= 2.0 ** (np.arange(COUNT) % 4)[:, None]  # of powers of two nothing is rounded
    write(tmp_path / "vectors", "a.parquet", range(50), circle[:50])
    write(tmp_path / "vectors", "b.parquet", [3, *range(50, COUNT)], circle[[3, *range(50, COUNT)]])
    write(tmp_path / "vectors", "c.parquet", ["null"], [None])
    return tmp_path / "vectors"


def write(folder: Path, name: str, numbers: Any, rows: Any, dtype: str = "float32") -> None:
    folder.mkdir(exist_ok=True)
    texts = pa.array([f"text {number}" for number in numbers])
    columns = vector_columns(list(rows), dtype, SIZE)
    pq.write_table(pa.table({"text": texts, **columns}), folder / name)


def read(file: Path) -> dict[int, list[int]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    number = {row["anchor"]: int(row["anchor"].split()[1]) for row in rows}
    return {
        number[row["anchor"]]: [int(text.split()[1]) for text in row["negative"]] for row in rows
    }


def test_negatives_are_of_the_ranks_that_were_asked_for(
    vectors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "new" / "negatives.jsonl", []
    options = MineOptions(vectors=vectors, out=out, negatives=3, range_min=4, range_max=10)
    assert mine(options, lambda *done: seen.append(done)) == COUNT
    assert seen == [(COUNT, COUNT)]
    mined = read(out)
    assert mined.keys() == set(range(COUNT))
    assert all(len(set(negatives)) == 3 for negatives in mined.values())
    for number in range(10, COUNT - 10):
        # Two neighbours at each distance: ranks 4 to 10 are those 3 to 5 away.
        assert {abs(other - number) for other in mined[number]} <= {3, 4, 5}
    again = tmp_path / "again.jsonl"
    monkeypatch.setattr("gem_vllm.training.mining.PAIRS_AT_ONCE", 40 * COUNT)
    mine(MineOptions(**{**vars(options), "out": again}), lambda *done: seen.append(done))
    assert seen[1:] == [(40, COUNT), (80, COUNT), (COUNT, COUNT)]
    assert again.read_text() == out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["negatives.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"range_max": 12}, "--range-max must be at least"),
        ({"negatives": 0}, "--negatives must be at least 1"),
        ({"out": Path("negatives.txt")}, "name a .jsonl"),
        ({"range_max": 90}, "holds 90 different texts; --range-max 90 needs more"),
        ({"text_column": "body"}, "has no column 'body'; embed with --keep body"),
        ({"vectors": Path("nowhere")}, "holds no Parquet files"),
        ({"seed": -1}, "--seed must be from 0 to 4294967295"),
        ({"seed": 2**32}, "--seed must be from 0 to 4294967295"),
    ],
)
def test_what_cannot_be_mined(
    change: dict[str, Any], message: str, vectors: Path, tmp_path: Path
) -> None:
    values = {"vectors": vectors, "out": tmp_path / "out.jsonl", **change}
    with pytest.raises(GemError, match=message):
        mine(MineOptions(**values), lambda *done: None)
    assert not (tmp_path / "out.jsonl").exists()


def test_the_command_mines_as_it_is_told(
    vectors: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """None of the options is a default."""
    for file in sorted(vectors.iterdir()):
        table = pq.read_table(file)
        pq.write_table(table.rename_columns(["body", *table.column_names[1:]]), file)
    told: dict[str, Any] = {
        "text_column": "body",
        "negatives": 3,
        "range_min": 5,
        "range_max": 20,
        "seed": 6,
    }
    mine(MineOptions(vectors=vectors, out=tmp_path / "api.jsonl", **told), lambda *done: None)
    words = [word for name, value in told.items() for word in (flag(name), str(value))]
    out = tmp_path / "command.jsonl"
    command = ["gem-vllm", "mine", str(vectors), "--out", str(out), *words]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    assert capsys.readouterr().out == f"{out}: {COUNT} texts with 3 negatives each\n"
    assert out.read_text() == (tmp_path / "api.jsonl").read_text()
    # Each of the options counts.
    for name, value in told.items():
        if name != "text_column":
            other = tmp_path / f"{name}.jsonl"
            changed = {**told, name: value + 1}
            mine(MineOptions(vectors=vectors, out=other, **changed), lambda *done: None)
            assert other.read_text() != out.read_text(), name


def test_what_is_there_is_not_overwritten(vectors: Path, tmp_path: Path) -> None:
    file, folder = tmp_path / "mine.jsonl", tmp_path / "folder.jsonl"
    file.write_text("mine")
    folder.mkdir()
    for out in (file, folder):
        with pytest.raises(GemError, match="is there already; remove it, or choose another --out"):
            MineOptions(vectors=vectors, out=out)
    with pytest.raises(GemError, match=f"nothing can be written in {file}"):
        MineOptions(vectors=vectors, out=file / "out.jsonl")
    assert file.read_text() == "mine"


def test_blank_texts_are_left_out(vectors: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    row = np.ones((2, SIZE), dtype=np.float32)
    table = pa.table({"text": [" \n", ""], **vector_columns(list(row), "float32", SIZE)})
    pq.write_table(table, vectors / "d.parquet")
    assert mine(MineOptions(vectors=vectors, out=out), lambda *done: None) == COUNT
    assert len(list(PairSource(out))) == COUNT


def make_binary(file: Path) -> None:
    write(file.parent, file.name, range(5), np.ones((5, SIZE), dtype=np.float32), "binary")


def make_lists(file: Path) -> None:
    lists = pa.array([[1.0, 0.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"text": ["a"], "embedding": lists}), file)


def make_numbers(file: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "embedding": [1.0]}), file)


def make_another_size(file: Path) -> None:
    columns = vector_columns([np.ones(4, dtype=np.float32)], "float32", 4)
    pq.write_table(pa.table({"text": ["a"], **columns}), file)


def make_texts_numbers(file: Path) -> None:
    columns = vector_columns([np.ones(SIZE, dtype=np.float32)], "float32", SIZE)
    pq.write_table(pa.table({"text": [1], **columns}), file)


def make_damaged(file: Path) -> None:
    """A page that is no page, behind a footer that is whole."""
    write(file.parent, file.name, range(50), np.ones((50, SIZE), dtype=np.float32))
    content = bytearray(file.read_bytes())
    content[4:80] = b"\xff" * 76
    file.write_bytes(content)


def make_folder(file: Path) -> None:
    file.mkdir()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_binary, "no float32 or float16 vectors"),
        (make_lists, "no float32 or float16 vectors"),
        (make_numbers, "no float32 or float16 vectors"),
        (make_another_size, f"holds vectors of 4 numbers, and others {SIZE}"),
        (make_texts_numbers, "column 'text' holds no texts but int64"),
        (make_damaged, "cannot be read"),
        (make_folder, "cannot be read"),
    ],
)
def test_files_that_hold_something_else_are_refused(
    make: Callable[[Path], None], message: str, vectors: Path, tmp_path: Path
) -> None:
    make(vectors / "d.parquet")
    with pytest.raises(GemError, match=f"d.parquet.* {message}") as raised:
        mine(MineOptions(vectors=vectors, out=tmp_path / "out.jsonl"), lambda *done: None)
    assert "\n" not in str(raised.value)
