"""Which Ray a job works on, and what an engine gets of it, without one."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from gem_vllm.serving import pool
from gem_vllm.serving.options import ReplicaOptions


@pytest.mark.parametrize(("given", "asked"), [(None, "local"), ("auto", "auto")])
def test_without_an_address_ray_is_the_jobs_own(
    given: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **arguments: calls.append(arguments))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pool.ray_cluster(ReplicaOptions(ray_address=given)):
        pass
    assert [call["address"] for call in calls] == [asked]


@pytest.mark.parametrize(
    ("nodes", "replicas", "cpus"), [([4, 2], 1, 4), ([4, 4], 4, 2), ([1, 1], 4, 1), ([0], 1, 1)]
)
def test_an_engine_gets_no_more_cpus_than_a_node_has(
    nodes: list[int], replicas: int, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in nodes]
    gone = {"Alive": False, "Resources": {}}
    monkeypatch.setattr(ray, "nodes", lambda: [*alive, gone])
    monkeypatch.setattr(pool, "is_cpu_build", lambda: True)
    needs, environment, _ = pool.engine_needs(ReplicaOptions(max_replicas=replicas))
    assert (needs, environment["OMP_NUM_THREADS"]) == ((cpus, 0), str(cpus))


@pytest.mark.parametrize(
    ("cpu_build", "needs"), [(True, (8, 0)), (False, (1, 4))], ids=["cpu", "cuda"]
)
def test_workers_of_a_pipeline_count(
    cpu_build: bool, needs: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    monkeypatch.setattr(pool, "is_cpu_build", lambda: cpu_build)
    replicas = ReplicaOptions(tensor_parallel=2, engine={"pipeline_parallel_size": 2})
    found, environment, engine = pool.engine_needs(replicas)
    assert found == needs
    assert engine == {
        **({"dtype": engine.get("dtype")} if cpu_build else {}),
        "tensor_parallel_size": 2,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    if cpu_build:
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
        assert environment["OMP_NUM_THREADS"] == "2"
