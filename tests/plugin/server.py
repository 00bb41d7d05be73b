"""`vllm serve` as a process of its own, and how its answers are read."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gem_vllm.reference import ReferenceEmbedder

LIMIT = 256
START_SECONDS = 400
VLLM = str(Path(sys.executable).with_name("vllm"))


@dataclass
class Server:
    """A running server, its checkpoint, and the reference for that."""

    url: str
    folder: Path
    reference: ReferenceEmbedder

    def post(self, route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{route}", json={"model": "gem", **body}, timeout=60)

    def embed(self, texts: Any, **options: Any) -> list[list[float]]:
        answer = self.post("/v1/embeddings", input=texts, **options)
        assert answer.status_code == 200, answer.text
        return [entry["embedding"] for entry in answer.json()["data"]]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def metric(self, name: str, labels: str = "") -> dict[str, float]:
        """Of ``/metrics``: the lines of a name that have some labels, and their values."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        found = [line for line in lines if line.startswith(name) and labels in line]
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in found}


@contextmanager
def running_server(folder: Path, log: Path, *options: str) -> Iterator[Server]:
    """`vllm serve` of a checkpoint as model ``gem``, in float32 and eager; output goes to `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(VLLM, "serve", str(folder), "--port", str(port), "--host", "127.0.0.1"),
        *("--served-model-name", "gem", "--max-model-len", str(LIMIT)),
        *("--dtype", "float32", "--enforce-eager", *options),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log)
        yield Server(url, folder, ReferenceEmbedder(folder))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"vllm serve ended:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(f"vllm serve did not come up:\n{log.read_text()[-3000:]}")
