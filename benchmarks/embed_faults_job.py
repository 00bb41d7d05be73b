"""The job of `embed_faults.py`: its command line, and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from raylets import Raylets, kill

NODES = 2
ROWS_PER_SHARD = 1000
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 512,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 256,
    "enable_prefix_caching": False,
}


@dataclass
class Bench:
    """What all rounds share.

    Attributes:
        work: folder for the model, the texts and the outputs.
        cluster: to run on.
        about: of every run: commit and hardware, on which rounds may differ.
        stack: ends drivers that are still at work.
    """

    work: Path
    cluster: Raylets
    about: dict[str, str]
    stack: ExitStack

    def command(self, rows: int, output: Path) -> list[str]:
        """The job over the first ``rows`` texts."""
        return [
            *(sys.executable, "-m", "gem_vllm.cli", "embed"),
            *("--model", str(self.work / "model"), "--input", str(self.texts(rows))),
            *("--output", str(output), "--rows-per-shard", str(ROWS_PER_SHARD)),
            *("--ray-address", self.cluster.address, "--cpus-per-replica", "1"),
            *("--min-replicas", str(NODES), "--max-replicas", str(NODES)),
            *("--engine", json.dumps(ENGINE)),
        ]

    def texts(self, rows: int) -> Path:
        """The file with the first ``rows`` texts."""
        return self.work / f"texts-{rows}.txt"


class Run:
    """The job as a process; while it is waited for, its progress and memory are noted.

    Attributes:
        process: the driver.
        progress: seconds, rows finished and the driver's resident MiB, at every new shard.
    """

    def __init__(self, bench: Bench, rows: int, output: Path) -> None:
        self._output = output
        self._started = time.monotonic()
        self._ended: float | None = None
        self.progress: list[tuple[float, int, float]] = []
        with (bench.work / "job.log").open("ab") as log:
            self.process = psutil.Popen(
                bench.command(rows, output), stdout=subprocess.DEVNULL, stderr=log
            )
        bench.stack.callback(kill, [self.process])

    @property
    def seconds(self) -> float:
        """Since the start, or until the end."""
        return (self._ended or time.monotonic()) - self._started

    def rows_done(self) -> int:
        """Rows of finished shards; the last shard counted as a full one."""
        return ROWS_PER_SHARD * len(list(self._output.glob("_gem/done/[0-9]*.json")))

    def wait(self, until: float = float("inf"), rows: float = float("inf")) -> int | None:
        """Wait for the end, for a second or for so many finished rows, whichever is first.

        Returns:
            The exit code; None while it runs.
        """
        finished = self.rows_done()
        while self.process.poll() is None and self.seconds < until and finished < rows:
            finished = self.rows_done()
            if finished > (self.progress[-1][1] if self.progress else 0):
                try:
                    memory = self.process.memory_info().rss / 2**20
                except psutil.NoSuchProcess:
                    break
                self.progress.append((self.seconds, finished, memory))
            time.sleep(0.1)
        code = self.process.poll()
        if code is not None and self._ended is None:
            self._ended = time.monotonic()
        return code
