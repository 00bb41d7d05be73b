"""Which Ray a job works on, and what an engine gets of it, without one."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import ray

from gem_vllm.errors import GemError
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
    checked: list[ReplicaOptions] = []
    monkeypatch.setattr(pool, "check_room", checked.append)
    with pool.ray_cluster(ReplicaOptions(ray_address=given)):
        pass
    assert [call["address"] for call in calls] == [asked]
    assert len(checked) == (asked == "local")  # to a cluster nodes may come


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ((1.0, 0), "--min-replicas 3 takes 3 CPUs, 1 for each; this machine has 2"),
        ((0.5, 2), "--min-replicas 3 takes 6 GPUs, 2 for each; this machine has 0"),
    ],
)
def test_replicas_that_this_machine_cannot_hold_are_refused(
    needs: tuple[float, float], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(pool, "engine_needs", lambda _: (needs, {}, {}))
    with pytest.raises(GemError, match=message):
        pool.check_room(ReplicaOptions(min_replicas=3, max_replicas=3))


def test_a_call_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data ends what has given nothing for half an hour, unless it is told not to."""
    monkeypatch.setattr(pool, "engine_needs", lambda _: ((1, 0), {}, {}))
    rows = MagicMock()
    pool.map_in_pool(rows, object, ReplicaOptions(), most_actors=None, batch_size=1, arguments={})
    assert rows.context.execution_no_progress_timeout_s == -1
    assert hasattr(ray.data.DataContext, "execution_no_progress_timeout_s")


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
