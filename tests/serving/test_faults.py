"""What a job goes through: kills of its processes and of a node, Ctrl-C, a full disk."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from raylets import is_replica, kill, raylets

from gem_vllm import cli
from gem_vllm.serving.manifest import DONE
from tests.processes import started, wait_until
from tests.serving.jobs import WAIT_SECONDS, check_all_rows, embed_command, finished_shards, jsonl
from tests.serving.processes import replicas_of, standing_still

# Seconds of work after the engine's start, so that a kill after the first shards is in the middle.
ROWS = 4000


def test_a_replica_that_dies_again_and_again_ends_the_job(model: Path, tmp_path: Path) -> None:
    jsonl(tmp_path / "in.jsonl", 20)
    command = embed_command(model, tmp_path)
    with started(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        driver = psutil.Process(process.pid)
        wait_until(lambda: replicas_of(driver), "a replica starts", WAIT_SECONDS)
        deadline = time.monotonic() + 600
        while process.poll() is None:
            assert time.monotonic() < deadline, "the job goes on"
            kill(replicas_of(driver))
            time.sleep(0.2)
        printed, told = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert told.splitlines()[-1].startswith("error: a replica died")


def disturbed(
    command: list[str],
    output: Path,
    disturb: Callable[[psutil.Process, list[psutil.Process]], None],
) -> tuple[int, str]:
    """Run a job; after two more shards its replicas stand still, and ``disturb`` ends something.

    Returns:
        Its exit status and what it printed. Whoever had a model in memory is gone.
    """
    before = finished_shards(output)
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        driver = psutil.Process(process.pid)
        wait_until(lambda: finished_shards(output) >= before + 2, "two more shards", WAIT_SECONDS)
        everything = driver.children(recursive=True)
        replicas = [process for process in everything if is_replica(process)]
        with standing_still(replicas):
            disturb(driver, replicas)
        printed, _ = process.communicate(timeout=600)
    wait_until(
        lambda: not any(is_replica(process) for process in everything),
        "the replicas end",
        WAIT_SECONDS,
    )
    return process.returncode, printed


def test_kills_lose_nothing_and_write_nothing_twice(model: Path, tmp_path: Path) -> None:
    """By the command line: a Ctrl-C, a kill -9 of the driver, and one of a replica of two."""
    jsonl(tmp_path / "in.jsonl", ROWS)
    output = tmp_path / "out"
    command = embed_command(model, tmp_path)
    for number, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        status, _ = disturbed(command, output, lambda driver, _, n=number: driver.send_signal(n))
        assert status == expected
    kept = finished_shards(output)
    assert 4 <= kept < ROWS // 50
    two = [*command, "--min-replicas", "2"]
    status, printed = disturbed(two, output, lambda _, replicas: replicas[0].kill())
    summary = json.loads(printed)
    assert status == 0
    assert summary["this_run"]["rows"] == ROWS - 50 * kept
    assert summary["rows_embedded"] == ROWS
    check_all_rows(model, output, ROWS)


@pytest.mark.slow
def test_a_node_that_is_killed_costs_nothing(model: Path, tmp_path: Path) -> None:
    """A node with one of two replicas: the other one does all, without a second command."""
    jsonl(tmp_path / "in.jsonl", ROWS)
    with raylets(2) as nodes:
        command = [*embed_command(model, tmp_path), "--ray-address", nodes.address]
        command += ["--min-replicas", "2", "--cpus-per-replica", "1"]
        with started(command, stdout=subprocess.PIPE, text=True) as process:
            wait_until(lambda: finished_shards(tmp_path / "out") >= 1, "a shard", WAIT_SECONDS)
            nodes.kill_node(0)
            printed, _ = process.communicate(timeout=600)
        wait_until(lambda: not nodes.replicas(), "the replicas end", WAIT_SECONDS)
    assert (process.returncode, json.loads(printed)["rows_embedded"]) == (0, ROWS)
    check_all_rows(model, tmp_path / "out", ROWS)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 150 KiB."""
    folder = tmp_path / "out"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "gem-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system of its own to be had: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.usefixtures("cluster")
def test_a_full_disk_ends_the_job_and_space_finishes_it(
    model: Path,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jsonl(tmp_path / "in.jsonl", 600)
    monkeypatch.setattr("sys.argv", embed_command(model, tmp_path)[2:])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (stop.value.code, len(told)) == (1, 1)
    assert f"{small_disk} cannot be written" in told[0]
    assert "No space left on device" in told[0]
    finished = finished_shards(small_disk)
    assert 0 < finished < 12
    # Each as a whole, with what the marker says it has.
    for marker in (small_disk / DONE).glob("[0-9]*.json"):
        part = pq.read_table(small_disk / f"part-{marker.stem}.parquet")
        assert len(part) == json.loads(marker.read_text())["rows"] == 50

    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    with contextlib.suppress(SystemExit):
        cli.main()
    summary = json.loads(capsys.readouterr().out)
    assert summary["this_run"]["rows"] == 600 - 50 * finished
    check_all_rows(model, small_disk, 600)
