"""A job's state: bound to what it began with, written whole."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from gem_vllm.errors import GemError
from gem_vllm.serving.inputs import InputFile
from gem_vllm.serving.manifest import (
    DONE,
    OutputFolder,
    fingerprint,
    make_plan,
)

FILES = [InputFile("a.txt", 10, "1"), InputFile("b.txt", 0, "1"), InputFile("c.txt", 20, "1")]
BOUND = {"input": "i", "checkpoint": "c", "options": {"dtype": "float32", "keep": []}}


def plan_of(rows_per_shard: int = 4):
    return make_plan(BOUND, FILES, [10, 0, 4], rows_per_shard)


def test_shards_hold_every_row_once() -> None:
    plan = plan_of()
    assert [(s.index, s.file, s.start, s.stop) for s in plan.shards] == [
        (0, 0, 0, 4),
        (1, 0, 4, 8),
        (2, 0, 8, 10),
        (3, 2, 0, 4),
    ]
    assert plan.rows == 14


def test_a_folder_goes_on_with_its_own_plan(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "out"))
    plan = folder.open_plan(BOUND, plan_of)
    assert OutputFolder(str(tmp_path / "out")).open_plan(BOUND, lambda: plan_of(2)) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": "j"}, "the input files changed"),
        ({"checkpoint": "d"}, "the checkpoint is another"),
        ({"options": {"dtype": "int8", "keep": []}}, "dtype was 'float32', is 'int8'"),
        ({"options": {"dtype": "float32", "keep": ["n"]}}, r"keep was \[\], is \['n'\]"),
    ],
)
def test_another_job_is_refused_with_what_differs(
    change: dict, message: str, tmp_path: Path
) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.open_plan(BOUND, plan_of)
    with pytest.raises(GemError, match=message):
        folder.open_plan(BOUND | change, plan_of)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.parquet").write_text("x")
    with pytest.raises(GemError, match=r"holds something else \(precious.parquet\)"):
        OutputFolder(str(tmp_path)).open_plan(BOUND, plan_of)
    with pytest.raises(GemError, match="is a file"):
        OutputFolder(str(tmp_path / "precious.parquet")).open_plan(BOUND, plan_of)


@pytest.mark.parametrize("url", ["{tmp}/out", "memory://out-{name}"])
def test_files_are_written_whole_or_not_at_all(url: str, tmp_path: Path) -> None:
    folder = OutputFolder(url.format(tmp=tmp_path, name=tmp_path.name))
    folder.write_json("part-00003.parquet", "rows")
    folder.write_json(f"{DONE}/00003.json", {"rows": 1})
    with contextlib.suppress(KeyboardInterrupt), folder.writing(f"{DONE}/00004.json") as path:
        Path(path).write_text("{")
        raise KeyboardInterrupt
    assert folder.finished() == {3: {"rows": 1}}
    left = folder.fs.ls(f"{folder.path}/{DONE}", detail=False)
    assert [name.rsplit("/", 1)[-1] for name in left] == ["00003.json"]
    folder.fs.rm(f"{folder.path}/part-00003.parquet")
    assert folder.finished() == {}


def test_scraps_of_killed_writers_are_removed(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write_json(f"{DONE}/00000.json", {})
    (tmp_path / ".part-00001.parquet-0123").write_text("half")
    (tmp_path / DONE / ".00001.json-0123").write_text("{")
    folder.remove_scraps()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["00000.json"]


def test_the_fingerprint_sees_every_change() -> None:
    changed = [replace(FILES[0], size=11), replace(FILES[0], mark="2"), replace(FILES[0], url="z")]
    prints = {fingerprint([file, *FILES[1:]]) for file in [FILES[0], *changed]}
    assert len(prints) == 4
