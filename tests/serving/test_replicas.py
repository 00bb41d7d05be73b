"""Replicas of a job: as many as there is work for, several workers to a model, their metrics."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil
import pytest
import ray

from gem_vllm.serving.job import run_embed_job
from gem_vllm.serving.options import EmbedOptions
from tests.processes import wait_until
from tests.serving.jobs import REPLICAS, WAIT_SECONDS, check_all_rows, finished_shards, jsonl
from tests.serving.processes import replicas_of, standing_still

pytestmark = pytest.mark.usefixtures("cluster")


def options_of(model: Path, folder: Path, rows: int, rows_per_shard: int) -> EmbedOptions:
    return EmbedOptions(
        model=model,
        input=str(jsonl(folder / "in.jsonl", rows)),
        output=str(folder / "out"),
        id_column="id",
        rows_per_shard=rows_per_shard,
    )


def test_two_workers_share_a_replicas_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_checkpoint("llama", k=2, num_attention_heads=4, num_key_value_heads=2)
    options = options_of(model, tmp_path, 200, 50)
    summary = run_embed_job(options, replace(REPLICAS, tensor_parallel=2))
    assert summary["rows_embedded"] == 200
    check_all_rows(model, Path(options.output), 200)


def test_a_second_replica_is_started_where_there_is_work_and_metrics_tell_of_it(
    model: Path, tmp_path: Path
) -> None:
    rows = 12_000
    options = options_of(model, tmp_path, rows, 200)
    reports: list[dict[str, Any]] = []
    one_or_two = replace(REPLICAS, min_replicas=1, max_replicas=2)
    (node,) = (node for node in ray.nodes() if node["Alive"])
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    names = {f"ray_gem_job_{name}_total" for name in ("rows", "embedded", "tokens")}
    found: dict[str, float] = {}

    def told_by_metrics() -> bool:
        """Whether all are there; ``found`` has their sums over the replicas."""
        found.clear()
        try:
            with urlopen(url) as answer:
                lines = answer.read().decode().splitlines()
        except URLError:  # The node's exporter is not up yet.
            return False
        for line in lines:
            if f'output="{options.output}"' in line:
                name, value = line.split("{")[0], float(line.rsplit(" ", 1)[1])
                found[name] = found.get(name, 0) + value
        return set(found) == names

    def see_two_at_work(report: dict[str, Any]) -> None:
        """However fast one is: it stands still until the other has done something, too."""
        reports.append(report)
        if len(reports) > 1:
            return
        driver, output = psutil.Process(), Path(options.output)
        with standing_still(replicas_of(driver)):
            wait_until(lambda: len(replicas_of(driver)) == 2, "a second replica", WAIT_SECONDS)
        for replica in replicas_of(driver):
            with standing_still([replica]):
                before = finished_shards(output)
                wait_until(
                    lambda before=before: finished_shards(output) > before,
                    "the other replica writes a shard",
                    WAIT_SECONDS,
                )

    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(run_embed_job, options, one_or_two, see_two_at_work)
        wait_until(
            lambda: told_by_metrics() or job.done(), "the metrics tell of the job", WAIT_SECONDS
        )
        summary = job.result()
    replicas = [report["replicas"] for report in reports]
    assert (replicas[0], max(replicas)) == (1, 2)
    assert summary["rows_embedded"] == rows
    assert set(found) == names
    assert 0 < found["ray_gem_job_embedded_total"] <= found["ray_gem_job_rows_total"] <= rows
    assert found["ray_gem_job_tokens_total"] > found["ray_gem_job_rows_total"]
