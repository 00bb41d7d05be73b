"""`vllm serve` as a process of its own, and how its answers are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from gem_vllm.demo.server import wait_until_healthy
from gem_vllm.machine import free_ports
from gem_vllm.processes import process_group
from gem_vllm.reference import ReferenceEmbedder

LIMIT = 256
START_SECONDS = 900
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
    (port,) = free_ports(1)
    command = [
        *(VLLM, "serve", str(folder), "--port", str(port), "--host", "127.0.0.1"),
        *("--served-model-name", "gem", "--max-model-len", str(LIMIT)),
        *("--dtype", "float32", "--enforce-eager", *options),
    ]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with process_group(command, env=environment, log=log) as process:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(process, url, log, seconds=START_SECONDS)
        yield Server(url, folder, ReferenceEmbedder(folder))
