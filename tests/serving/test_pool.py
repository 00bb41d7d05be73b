"""Which Ray a job works on, and what an engine gets of it, without one."""

from __future__ import annotations

import sys
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
    told: list[ReplicaOptions] = []
    monkeypatch.setattr(pool, "tell_what_is_waited_for", told.append)
    with pool.ray_cluster(ReplicaOptions(ray_address=given)):
        pass
    assert [call["address"] for call in calls] == [asked]
    assert len(checked) == (asked == "local")  # to a cluster nodes may come
    assert len(told) == (asked != "local")


def test_a_python_that_ray_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("started"))
    monkeypatch.setattr(sys, "executable", "/my models/.venv/bin/python")
    refused = pytest.raises(GemError, match=r"/my models/\.venv/bin/python, whose path has a space")
    with refused, pool.ray_cluster(ReplicaOptions()):
        pass


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


def test_what_no_node_of_a_cluster_has_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 8.0}]
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": n} for n in nodes])
    for gpus, says in ((8, ""), (16, "no node of the cluster has the 1 CPUs and 16 GPUs")):
        monkeypatch.setattr(pool, "engine_needs", lambda _, gpus=gpus: ((1, gpus), {}, {}))
        pool.tell_what_is_waited_for(ReplicaOptions())
        told = capsys.readouterr().err
        assert told.startswith(says)
        assert bool(told) == bool(says)
    assert "the most are 8 and 8); waiting for one to join" in told


def test_a_call_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data ends what has given nothing for half an hour, unless it is told not to."""
    monkeypatch.setattr(pool, "engine_needs", lambda _: ((1, 0), {}, {}))
    rows = MagicMock()
    pool.map_in_pool(rows, object, ReplicaOptions(), most_actors=None, batch_size=1, arguments={})
    assert rows.context.execution_no_progress_timeout_s == -1
    assert rows.context.max_consecutive_actor_init_deaths > 0
    for name in ("execution_no_progress_timeout_s", "max_consecutive_actor_init_deaths"):
        assert hasattr(ray.data.DataContext, name)


@pytest.mark.parametrize(
    ("nodes", "replicas", "cpus"),
    [
        ([4, 2], 1, 4),
        ([4, 4], 4, 2),
        ([1, 1], 4, 1),
        ([0], 1, 1),
        ([8, 8], 3, 4),
        ([0, 8, 8, 8, 8], 5, 4),
        ([6, 4], 2, 4),
    ],
)
def test_as_many_engines_fit_on_the_nodes_as_there_are_to_be(
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
