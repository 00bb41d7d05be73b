"""The demo's server and client on vLLM itself, with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from gem_vllm.demo import server
from gem_vllm.demo.client import Client, Totals
from gem_vllm.machine import free_ports, serve_environment
from gem_vllm.processes import process_group
from tests.processes import alive
from tests.tiny import make_tiny_checkpoint


async def embed_and_chat(url: str) -> tuple[np.ndarray, str, dict[str, int]]:
    async with Client(url) as client:
        texts = [f"a text with the number {i}" for i in range(8)]
        embeddings = await client.embed_all(texts, totals=Totals(), on_progress=lambda n: None)
        answer = Totals()
        question = [{"role": "user", "content": "Hello!"}]
        pieces = [piece async for piece in client.chat(question, answer)]
        assert answer.tokens > 0
        return embeddings, "".join(pieces), await client.step_counts()


@pytest.mark.slow
def test_every_process_of_the_engine_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tiny_checkpoint("llama", tmp_path / "model", k=1)
    monkeypatch.setattr(server, "CONTEXT_TOKENS", 256)
    (port,) = free_ports(1)
    command = server.serve_command(tmp_path / "model", port)
    log = tmp_path / "log"
    with process_group(command, env=serve_environment(), log=log) as process:
        url = f"http://127.0.0.1:{port}"
        server.wait_until_healthy(process, url, log)
        session = members_of_session(process.pid)
        embeddings, _, steps = asyncio.run(embed_and_chat(url))
    assert len(session) >= 3  # API server, engine core, worker
    assert embeddings.shape[0] == 8
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-3)
    assert steps["embed"] > 0
    assert steps["generate"] > 0
    time.sleep(0.5)
    assert members_of_session(process.pid) == []


def members_of_session(session: int) -> list[int]:
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError):  # it has ended
            if os.getsid(pid) == session and alive(pid):
                members.append(pid)
    return members
