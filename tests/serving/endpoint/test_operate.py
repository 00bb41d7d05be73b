"""Starting, watching and draining an endpoint, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from gem_vllm.errors import GemError
from gem_vllm.serving.endpoint import operate
from gem_vllm.serving.endpoint.options import APP_NAME, EndpointOptions
from gem_vllm.serving.errors import JobError

HOST, PORT = "127.0.0.1", 8000
GONE = DeploymentID("GemServer")


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=2)


class Cluster:
    """A cluster with Serve on it.

    Attributes:
        applications: that it has, by name.
        error: that starting one more ends with; None lets it start.
        deleted: names of applications.
        nodes: how many are alive.
    """

    def __init__(self) -> None:
        self.applications: dict[str, Any] = {}
        self.error: Exception | None = None
        self.deleted: list[str] = []
        self.nodes = 1

    def start(self, **_: Any) -> None:
        if self.error is not None:
            raise self.error

    def status(self) -> Any:
        return SimpleNamespace(applications=self.applications)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()

    @contextmanager
    def no_ray(_: Any) -> Any:
        yield

    client = SimpleNamespace(http_config=SimpleNamespace(host=HOST, port=PORT))
    monkeypatch.setattr(operate, "ray_cluster", no_ray)
    monkeypatch.setattr(operate, "_get_global_client", lambda **_: client)
    monkeypatch.setattr(operate, "build", lambda _: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}] * cluster.nodes)
    monkeypatch.setattr(serve, "start", cluster.start)
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(serve, "status", cluster.status)
    monkeypatch.setattr(serve, "delete", cluster.deleted.append)
    return cluster


def run(options: EndpointOptions, ray_address: str | None, port: int = PORT) -> None:
    operate.run_endpoint(options, HOST, port, ray_address, lambda _: None)


def test_an_application_of_somebody_else_stays(model: Path, cluster: Cluster) -> None:
    cluster.applications[APP_NAME] = SimpleNamespace(deployments={})
    with pytest.raises(GemError, match="has an application 'gem' already"):
        run(EndpointOptions(model), "auto")
    assert cluster.deleted == []


def test_each_nodes_own_address_is_refused_where_there_are_several(
    model: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.nodes = 2
    monkeypatch.setattr(operate, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(operate, "RAY_SERVE_ENABLE_HA_PROXY", False)
    with pytest.raises(JobError, match="deleted by somebody else"):  # it was begun
        run(EndpointOptions(model), "auto")
    cluster.deleted.clear()
    monkeypatch.setattr(operate, "RAY_SERVE_ENABLE_HA_PROXY", True)
    with pytest.raises(GemError, match=r"--host 127\.0\.0\.1 is each node's own, .* has 2; give"):
        run(EndpointOptions(model), "auto")
    assert cluster.deleted == []


def test_an_address_that_serve_does_not_have_is_refused(model: Path, cluster: Cluster) -> None:
    with pytest.raises(GemError, match=r"listens on 127\.0\.0\.1:8000 already; give --host"):
        run(EndpointOptions(model), "auto", port=9000)
    assert cluster.deleted == []


def test_what_was_started_is_deleted(
    model: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operate, "WATCH_SECONDS", 0.0)
    with pytest.raises(JobError, match="deleted by somebody else"):
        run(EndpointOptions(model), "auto")
    assert cluster.deleted == [APP_NAME]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no"), ValueError("no"), TimeoutError("no"), RayServeException("no")],
    ids=lambda error: type(error).__name__,
)
def test_a_start_that_fails_is_told_with_its_reason(
    error: Exception, model: Path, cluster: Cluster
) -> None:
    cluster.error = error
    with pytest.raises(JobError, match="could not be brought up: no"):
        run(EndpointOptions(model), "auto")


def test_a_start_that_loses_serve_is_told_by_the_error_alone(
    cluster: Cluster, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise RayServeException("no controller")

    cluster.error = RayError("the cluster is gone")
    monkeypatch.setattr(serve, "status", fail)
    with pytest.raises(JobError, match="could not be brought up: the cluster is gone"):
        operate._start(EndpointOptions(model), HOST, PORT)


def test_a_replica_that_dies_does_not_end_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"drain": [None, ActorDiedError()], "open_requests": [0, ActorDiedError()]}

    class Broadcast:
        def __init__(self, method: str) -> None:
            self._answers = answers[method]

        async def results_async(self, *, return_exceptions: bool = False, **_: Any) -> list[Any]:
            for answer in self._answers:
                if isinstance(answer, Exception) and not return_exceptions:
                    raise answer
            return self._answers

    reports: list[str] = []
    monkeypatch.setattr(operate, "DRAIN_POLL_SECONDS", 0.0)
    monkeypatch.setattr(serve, "get_app_handle", lambda _: SimpleNamespace(broadcast=Broadcast))
    asyncio.run(operate._drain(10.0, reports.append))
    assert reports == []


def test_a_replica_that_starts_while_others_drain_is_drained_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second of them is there from the third call on, and takes requests until told."""
    calls: list[str] = []

    class Broadcast:
        def __init__(self, method: str) -> None:
            calls.append(method)

        async def results_async(self, **_: Any) -> list[Any]:
            if calls[-1] == "drain":
                return [None]
            return [0] if len(calls) < 3 else [0, 0 if "drain" in calls[2:] else 1]

    reports: list[str] = []
    monkeypatch.setattr(operate, "DRAIN_POLL_SECONDS", 0.0)
    monkeypatch.setattr(serve, "get_app_handle", lambda _: SimpleNamespace(broadcast=Broadcast))
    asyncio.run(operate._drain(10.0, reports.append))
    assert reports == []


@pytest.mark.parametrize(
    ("said", "polls", "report"),
    [
        ([TimeoutError(), [0], [0]], 3, []),
        ([DeploymentUnavailableError(GONE)] * 2, 2, []),
        ([TimeoutError()] * 3, 3, ["not all requests were answered within 10 s; they are dropped"]),
    ],
    ids=["one is silent for a while", "all are gone", "one is silent to the end"],
)
def test_a_replica_that_does_not_answer_does_not_end_the_drain(
    said: list[Any], polls: int, report: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [*said]

    class Broadcast:
        def __init__(self, method: str) -> None:
            self._method = method

        async def results_async(self, **_: Any) -> list[Any]:
            answer = left[0] if self._method == "drain" else left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    reports: list[str] = []
    monkeypatch.setattr(operate, "DRAIN_POLL_SECONDS", 0.0)
    monkeypatch.setattr(operate.time, "monotonic", lambda: 0.0 if left else 11.0)
    monkeypatch.setattr(serve, "get_app_handle", lambda _: SimpleNamespace(broadcast=Broadcast))
    asyncio.run(operate._drain(10.0, reports.append))
    assert len(said) - len(left) == polls
    assert reports == report
