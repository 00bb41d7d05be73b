"""Child processes that end with the block they are started in, and signals that leave it in order.

Only a SIGKILL of this process leaves its children behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from gem_vllm.errors import GemError

GRACE_SECONDS = 15.0


@contextlib.contextmanager
def process_group(
    command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``command`` in a process group of its own; on leaving the block, end the whole group.

    Output goes to the file ``log``, or to the terminal without one. The group first gets SIGTERM,
    then, after `GRACE_SECONDS`, SIGKILL. A Ctrl-C while the process starts or ends is held back
    until it has.
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("wb")) if log else None
        with _interrupts_held_back():
            process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
            stack.callback(_end_group, process)
        yield process


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP leave through ``finally`` clauses too, as Ctrl-C does.

    One that is ignored stays so (``nohup``). Outside the main thread, which alone is told of
    signals, nothing changes.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heeded = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for(process: subprocess.Popen[bytes], what: str) -> None:
    """Wait until ``process`` is done; raise GemError where it failed."""
    if status := process.wait():
        raise GemError(f"{what} failed with exit status {status}; its message is above")


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Note Ctrl-C and its like, and act on them after the block."""
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {n: signal.signal(n, lambda number, frame: noted.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[0])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with _interrupts_held_back():
        _signal_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while _group_lives(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _group_lives(process: subprocess.Popen[bytes]) -> bool:
    process.poll()  # reaps the leader, which would count as a member of its group otherwise
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
