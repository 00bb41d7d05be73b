"""A job's state: bound to what it began with, written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gem_vllm.errors import GemError
from gem_vllm.serving.columnar import Extent
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import InputFile
from gem_vllm.serving.manifest import DONE, PLAN, OutputFolder
from gem_vllm.serving.plan import Plan, fingerprint, make_plan

FILES = [InputFile("a.txt", 10, "1"), InputFile("b.txt", 0, "1"), InputFile("c.txt", 20, "1")]
BOUND = {"input": "i", "checkpoint": "c", "options": {"dtype": "float32", "keep": []}}


def plan_of(rows_per_shard: int = 4) -> Plan:
    return make_plan(BOUND, FILES, [Extent(10), Extent(0), Extent(4)], rows_per_shard)


def opened(folder: OutputFolder, bound: dict = BOUND, rows_per_shard: int = 4) -> Plan:
    with folder.open_plan(bound, lambda: replace(plan_of(rows_per_shard), bound=bound)) as plan:
        return plan


def begun(folder: OutputFolder, bound: dict = BOUND) -> None:
    """A job that has begun to write."""
    opened(folder, bound)
    folder.write_json("part-00000.parquet", {})


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
    plan = opened(folder)
    assert opened(OutputFolder(str(tmp_path / "out")), BOUND, 2) == plan


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
    begun(folder)
    with pytest.raises(GemError, match=message):
        opened(folder, BOUND | change)


def test_a_job_that_has_made_nothing_gives_way(tmp_path: Path) -> None:
    """As one does whose engine refused an option, which is mended."""
    folder, mended = OutputFolder(str(tmp_path)), BOUND | {"options": {"engine dtype": "float32"}}
    opened(folder, BOUND | {"options": {"engine dtype": "float31"}})
    assert opened(folder, mended, 2).bound == mended
    again = opened(OutputFolder(str(tmp_path)), mended)
    assert [shard.stop - shard.start for shard in again.shards] == [2] * 7


@pytest.mark.parametrize(("had", "has"), [("fail", "skip"), ("fail", "null"), ("skip", "fail")])
def test_only_a_job_without_bad_rows_goes_on_by_another_rule_for_them(
    had: str, has: str, tmp_path: Path
) -> None:
    before, after = ({**BOUND, "options": {"on_error": rule}} for rule in (had, has))
    begun(OutputFolder(str(tmp_path)), before)
    if had == "skip":
        with pytest.raises(GemError, match="on_error was 'skip', is 'fail'"):
            opened(OutputFolder(str(tmp_path)), after)
    else:
        assert opened(OutputFolder(str(tmp_path)), after).bound == after
        with pytest.raises(GemError, match=f"on_error was '{has}', is 'fail'"):
            opened(OutputFolder(str(tmp_path)), before)


def test_a_folder_is_one_jobs_at_a_time(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "out"))
    with (
        folder.open_plan(BOUND, plan_of),
        pytest.raises(GemError, match="another job is at work in"),
    ):
        opened(OutputFolder(str(tmp_path / "out")))
    assert opened(OutputFolder(str(tmp_path / "out"))) == plan_of()


@pytest.mark.parametrize("url", ["{tmp}/out", "memory://first-{name}"])
def test_of_two_jobs_that_begin_at_once_the_first_has_the_folder(url: str, tmp_path: Path) -> None:
    folder = OutputFolder(url.format(tmp=tmp_path, name=tmp_path.name))
    other = {**BOUND, "checkpoint": "d"}

    def plan_meanwhile() -> Plan:
        begun(OutputFolder(folder.url), BOUND)
        return replace(plan_of(2), bound=other)

    with (
        pytest.raises(GemError, match="the checkpoint is another"),
        folder.open_plan(other, plan_meanwhile),
    ):
        pass
    assert json.loads(folder.fs.cat_file(f"{folder.path}/{PLAN}"))["bound"] == BOUND


def test_an_output_that_cannot_be_looked_into_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder("memory://refused")

    def refuse(*_: object) -> None:
        raise LookupError("no credentials")

    monkeypatch.setattr(type(folder.fs), "isfile", refuse)
    with pytest.raises(GemError, match="--output memory://refused cannot be used: no credentials"):
        opened(folder)


def test_an_object_that_stands_for_the_folder_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = OutputFolder("memory://marked")
    monkeypatch.setattr(type(folder.fs), "ls", lambda *_, **__: ["/marked/", "/marked/_gem"])
    assert opened(folder) == plan_of()


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious.parquet").write_text("x")
    with pytest.raises(GemError, match=r"holds something else \(precious.parquet\)"):
        opened(OutputFolder(str(tmp_path)))
    with pytest.raises(GemError, match="is a file"):
        opened(OutputFolder(str(tmp_path / "precious.parquet")))


@pytest.mark.parametrize("url", ["{tmp}/out", "{tmp}/out[a]", "memory://out-{name}"])
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


@pytest.mark.parametrize("url", ["{tmp}/out", "memory://full-{name}"])
def test_a_disk_that_is_full_is_told_of_and_nothing_is_left(url: str, tmp_path: Path) -> None:
    folder = OutputFolder(url.format(tmp=tmp_path, name=tmp_path.name))
    folder.write_json(f"{DONE}/00000.json", {})
    scraps: list[Path] = []

    def fill_up() -> None:
        with folder.writing("part-00001.parquet") as path:
            scraps.append(Path(path))
            scraps[0].write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = r"cannot be written: .*No space left on device\. Mend that, and run the same command"
    with pytest.raises(JobError, match=f"^{folder.url} {told}"):
        fill_up()
    assert not scraps[0].exists()
    left = [name.rsplit("/", 1)[-1] for name in folder.fs.find(folder.path)]
    assert left == ["00000.json"]


def test_scraps_of_killed_writers_are_removed(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path))
    folder.write_json(f"{DONE}/00000.json", {})
    with folder.writing("part-00001.parquet") as path:
        Path(path).touch()
        scraps = [tmp_path / Path(path).name, tmp_path / DONE / Path(path).name]
    for path in (*scraps, tmp_path / ".not-ours"):
        path.write_text("half")
    folder.remove("part-00001.parquet")
    folder.remove_scraps()
    left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".not-ours", "00000.json"]


def test_the_fingerprint_sees_every_change() -> None:
    changed = [replace(FILES[0], size=11), replace(FILES[0], mark="2"), replace(FILES[0], url="z")]
    prints = {fingerprint([file, *FILES[1:]]) for file in [FILES[0], *changed]}
    assert len(prints) == 4
