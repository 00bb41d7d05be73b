"""A job whose input and output are in an object store, by a server that speaks S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from gem_vllm.demo.server import wait_until_healthy
from gem_vllm.machine import free_ports
from gem_vllm.processes import process_group
from gem_vllm.serving.manifest import DONE
from tests.processes import started, wait_until
from tests.serving.jobs import WAIT_SECONDS, check_all_rows, embed_command, jsonl

HOST = "127.0.0.1"
# Seconds of work after the engine's start, so that the kill is in the middle of it.
ROWS = 4000


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """A file system with an empty bucket "texts"; other processes find it by the environment.

    The server is a process of its own. Moto imports Flask, and in a process that has done that vLLM
    0.32 starts no engine on a CPU: it asks every object of every module for its ``__dict__``, and
    Flask's answer with an error.
    """
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{HOST}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")

    command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
    log = tmp_path / "s3.log"
    with process_group(command, env=os.environ, log=log) as process:
        url = f"http://{HOST}:{port}"
        wait_until_healthy(process, url, log, name="moto", path="/moto-api/")
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("texts")
        yield files


def test_a_job_in_an_object_store_is_gone_on_with(
    bucket: s3fs.S3FileSystem, model: Path, tmp_path: Path
) -> None:
    bucket.put(str(jsonl(tmp_path / "in.jsonl", ROWS)), "texts/in.jsonl")
    command = embed_command(model, "s3://texts")

    def finished() -> int:
        bucket.invalidate_cache()
        return len(bucket.glob(f"texts/out/{DONE}/*.json"))

    with started(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: finished() >= 2, "two shards", WAIT_SECONDS)
        process.kill()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    summary = json.loads(done.stdout)
    assert summary["rows_embedded"] == ROWS
    assert 0 < summary["this_run"]["rows"] <= ROWS - 100
    bucket.get("texts/out", str(tmp_path / "out"), recursive=True)
    check_all_rows(model, tmp_path / "out", ROWS)
