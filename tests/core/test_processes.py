"""No process outlives its block, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gem_vllm import processes
from gem_vllm.errors import GemError
from gem_vllm.processes import process_group, wait_for
from tests.processes import alive, started, wait_until

FAMILY = """
import os, signal, subprocess, sys, time
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(sys.argv[1] + ".new", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""
# Runs FAMILY in a process group, as the demo runs the server, until a signal comes.
OWNER = """
import sys, time
from gem_vllm.processes import process_group, terminated_like_interrupted
print("begins", flush=True)
with terminated_like_interrupted(), process_group([sys.executable, "-c", *sys.argv[1:]]):
    time.sleep(600)
"""


def pids_in(file: Path) -> list[int]:
    wait_until(file.exists, "the family is there", 120)
    return [int(pid) for pid in file.read_text().split()]


def test_leaving_the_block_ends_children_of_children(tmp_path: Path) -> None:
    with process_group([sys.executable, "-c", FAMILY, str(tmp_path / "pids")]):
        pids = pids_in(tmp_path / "pids")
        assert all(map(alive, pids))
    assert not any(map(alive, pids))


def test_an_exception_ends_them_and_goes_on(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail() -> None:
        with process_group([sys.executable, "-c", FAMILY, str(tmp_path / "pids")]):
            pids.extend(pids_in(tmp_path / "pids"))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert pids
    assert not any(map(alive, pids))


def test_who_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.3)
    with process_group([sys.executable, "-c", FAMILY, str(tmp_path / "pids"), "stubborn"]):
        pids = pids_in(tmp_path / "pids")
    wait_until(lambda: not any(map(alive, pids)), "the family ends", 120)


@pytest.mark.usefixtures("as_in_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_owner_ends_them(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, FAMILY, str(tmp_path / "pids")]
    with started(command, stderr=subprocess.DEVNULL) as owner:
        pids = pids_in(tmp_path / "pids")
        owner.send_signal(number)
        assert owner.wait(timeout=120) != 0
    wait_until(lambda: not any(map(alive, pids)), "the family ends", 30)


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, where the terminal that closes is to end nothing."""
    code = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {OWNER}"
    command = [sys.executable, "-c", code, FAMILY, str(tmp_path / "pids")]
    with started(command, stderr=subprocess.DEVNULL) as owner:
        pids = pids_in(tmp_path / "pids")
        owner.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            owner.wait(timeout=1.0)
        assert all(map(alive, pids))
        owner.send_signal(signal.SIGTERM)
        assert owner.wait(timeout=120) == 128 + signal.SIGTERM


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, None])
def test_ctrl_c_at_any_moment_leaves_nothing(delay: float | None, tmp_path: Path) -> None:
    """Seconds after the family is begun; None: once all of it is there."""
    mark, pids = f"mark-{os.getpid()}-{delay}", list[int]()
    command = [sys.executable, "-c", OWNER, FAMILY, str(tmp_path / "pids"), mark]

    def marked() -> int:
        """How many processes have the mark in their command."""
        return sum(
            mark in (each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])
        )

    with started(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"begins\n"
        if delay is None:
            pids += pids_in(tmp_path / "pids")
            assert marked() == 2, "the owner, and the family's first"
        else:
            time.sleep(delay)
        owner.send_signal(signal.SIGINT)
        owner.send_signal(signal.SIGINT)
        assert owner.wait(timeout=120) == -signal.SIGINT
    wait_until(lambda: not marked(), "the owner and the family's first end", 30)
    wait_until(lambda: not any(map(alive, pids)), "the family ends", 30)


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import sys; print('out'); print('err', file=sys.stderr)"
    with process_group([sys.executable, "-c", code], log=log) as process:
        wait_for(process, "a print")
    assert sorted(log.read_text().split()) == ["err", "out"]


def test_failure_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(GemError, match="a test failed with exit status 3"),
        process_group([sys.executable, "-c", "raise SystemExit(3)"]) as process,
    ):
        wait_for(process, "a test")
