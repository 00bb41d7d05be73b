"""`gem-vllm serve` as a process of its own, on a tiny model with a long context."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from gem_vllm.machine import free_ports
from tests.processes import wait_until

START_SECONDS = 900
# Two replicas take a core each, and no more, whatever the machine has.
TWO_CORES = '{"CPU": 2}'
# A tiny model is too quick for tests of what happens in the middle of an answer: they ask for
# more tokens than it can give in a minute.
CONTEXT = 16384
LONG = CONTEXT - 384
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 29,
    "max_model_len": CONTEXT,
    "max_num_batched_tokens": 512,
}


@dataclass
class Endpoint:
    """A running endpoint.

    Attributes:
        url: without a path.
        process: `gem-vllm serve`.
        log: what it prints.
        key: an API key that it lets in.
    """

    url: str
    process: psutil.Popen
    log: Path
    key: str | None = None

    def http(self, **options: Any) -> httpx.Client:
        """A client with the key."""
        return httpx.Client(**self._of_client(), **options)

    def async_http(self, **options: Any) -> httpx.AsyncClient:
        """One whose requests a test can take back."""
        return httpx.AsyncClient(**self._of_client(), **options)

    def _of_client(self) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return {"base_url": self.url, "headers": headers, "timeout": 120}

    def post(self, route: str, **body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(route, json={"model": "gem", **body})

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, over all processes."""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(f"{name}{{")
            and all(f'{label}="{value}"' in line for label, value in labels.items())
        )

    def requests(self, task: str, code: int) -> float:
        """How many were answered with this status."""
        return self.metric("ray_gem_requests_total", task=task, code=str(code))

    def replicas(self) -> list[psutil.Process]:
        """The processes of the engines' replicas."""
        return [p for p in self.process.children(recursive=True) if ":GemServer:" in title(p)]

    def engines(self) -> list[psutil.Process]:
        """The processes of the engines themselves, which their replicas have started."""
        below = [p for replica in self.replicas() for p in replica.children(recursive=True)]
        return [p for p in below if "EngineCore" in title(p)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # gone, or a zombie
        return ""


@contextlib.contextmanager
def running_endpoint(
    model: Path,
    log: Path,
    *options: str,
    key: str | None = None,
    engine: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Endpoint]:
    """`gem-vllm serve MODEL OPTIONS` until the block ends; nothing of it is left then.

    Args:
        model: a checkpoint, served as "gem".
        log: file for what the command prints.
        options: of the command.
        key: that the endpoint lets in.
        engine: options of the engine, besides `ENGINE`.
        environment: variables, besides this process's.
    """
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "gem_vllm.cli", "serve", str(model), "--port", str(port)),
        *("--served-model-name", "gem", "--engine", json.dumps({**ENGINE, **(engine or {})})),
        *options,
    ]
    # Metrics soon enough for a test to wait for; by default Ray takes ten seconds.
    own = {
        "OMP_NUM_THREADS": "1",
        "RAY_metrics_report_interval_ms": "500",
        "RAY_OVERRIDE_RESOURCES": TWO_CORES,
    }
    variables = {**os.environ, **own, **(environment or {})}
    with log.open("wb") as out:
        process = psutil.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    endpoint = Endpoint(f"http://127.0.0.1:{port}", process, log, key)
    try:
        wait_until(lambda: _is_up(endpoint), "the endpoint comes up", START_SECONDS)
        yield endpoint
    finally:
        children = process.children(recursive=True) if process.is_running() else []
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
        for leftover in [process, *children]:
            with contextlib.suppress(psutil.NoSuchProcess):
                leftover.kill()


def _is_up(endpoint: Endpoint) -> bool:
    told = endpoint.log.read_text()
    assert endpoint.process.poll() is None, f"gem-vllm serve ended:\n{told[-3000:]}"
    return "\nserving " in told


@pytest.fixture(scope="session")
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=2, max_position_embeddings=CONTEXT)
