"""Processes of jobs and endpoints, as tests find them and have them stand still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import psutil
from raylets import is_replica


def replicas_of(driver: psutil.Process) -> list[psutil.Process]:
    """The processes of a job's replicas."""
    try:
        return [process for process in driver.children(recursive=True) if is_replica(process)]
    except psutil.NoSuchProcess:
        return []


@contextlib.contextmanager
def standing_still(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """Processes that do nothing for the time of the block, which may end them."""
    stopped = list(processes)
    try:
        for process in stopped:
            process.suspend()
        yield
    finally:
        for process in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
