"""A Ray cluster on this machine, and the model that jobs have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One for all tests of a process.

    Of every cluster behind the first Ray 2.60 leaves a thread that exports metrics, and that may
    crash while the process ends.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Ray's default is 10 s, longer than these jobs are at work.
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        ray.init(
            address="local",  # whatever cluster RAY_ADDRESS names
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=2)
