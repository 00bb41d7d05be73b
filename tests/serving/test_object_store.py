"""A job whose input and output are in an object store, by a server that speaks S3."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs
from moto import server

from gem_vllm.serving.manifest import DONE
from tests.serving.jobs import check_all_rows, embed_command, jsonl, wait_for


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3fs.S3FileSystem]:
    """A file system with an empty bucket "texts"; other processes find it by the environment."""
    s3 = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    s3.start()
    host, port = s3.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    try:
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("texts")
        yield files
    finally:
        s3.stop()


def test_a_job_in_an_object_store_is_gone_on_with(
    bucket: s3fs.S3FileSystem, model: Path, tmp_path: Path
) -> None:
    bucket.put(str(jsonl(tmp_path / "in.jsonl", 600)), "texts/in.jsonl")
    command = embed_command(model, "s3://texts")

    def finished() -> int:
        bucket.invalidate_cache()
        return len(bucket.glob(f"texts/out/{DONE}/*.json"))

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: finished() >= 2)
        process.kill()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=180)
    summary = json.loads(done.stdout)
    assert (summary["rows_embedded"], summary["this_run"]["rows"] <= 500) == (600, True)
    bucket.get("texts/out", str(tmp_path / "out"), recursive=True)
    check_all_rows(model, tmp_path / "out", 600)
