"""Processes that tests start, and what they wait for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # or gone while it is read
        return False
    return state != "Z"


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[Popen[Any]]:
    """A process that does not outlive the block, whatever ends it."""
    with Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    """Until a condition holds; where it does not in time, the test fails and says ``what``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.1)
