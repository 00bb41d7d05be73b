"""The ingress without Ray: what it lets in, what it passes on, and what it counts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.ingress import Ingress, Limits, api
from gem_vllm.serving.endpoint.keys import new_key
from gem_vllm.serving.endpoint.messages import ForwardedRequest, ResponseStart


class Replicas:
    """A handle of replicas that keep what they get, and answer with nothing or an error."""

    app_name, deployment_name = "gem", "GemServer"

    def __init__(self) -> None:
        self.taken: list[ForwardedRequest] = []
        self.error: Exception | None = None

    def options(self, **_: Any) -> Replicas:
        return self

    async def remote(self, request: ForwardedRequest) -> ResponseStart:
        self.taken.append(request)
        if self.error is not None:
            raise self.error
        return ResponseStart(200, [], b"")


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """Requests by task and status."""
    counts: Counter[tuple[str, str]] = Counter()

    class Requests:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def inc(self, _: int, tags: dict[str, str]) -> None:
            counts[tags["task"], tags["code"]] += 1

    monkeypatch.setattr(metrics, "Counter", Requests)
    return counts


@pytest.fixture
def ask(
    replicas: Replicas,
    counted: Counter[tuple[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., httpx.Response]:
    """Send a request to an ingress that wants a key and waits for a tenth of a second."""
    new_key(tmp_path / "keys", "a")
    # Without Serve's wrapper, which runs in a replica only.
    ingress = Ingress.__bases__[0](replicas, Limits(0.1, 16, 1000), tmp_path / "keys")
    context = SimpleNamespace(servable_object=ingress)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    monkeypatch.setattr(api, "middleware_stack", None)

    def send(method: str, path: str, *, root_path: str = "", **options: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(api, raise_app_exceptions=False, root_path=root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://gem") as client:
                return await asyncio.wait_for(client.request(method, path, **options), 10)

        return asyncio.run(run())

    return send


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    """Headers with a key that is let in."""
    return {"Authorization": f"Bearer {new_key(tmp_path / 'keys', 'b')}"}


async def body_that_does_not_end() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ping", 200),
        ("HEAD", "/version", 200),
        ("OPTIONS", "/v1/embeddings", 200),
        ("POST", "/ping", 401),
        ("DELETE", "/health", 401),
        ("GET", "/v1/models", 401),
        ("GET", "//ping", 401),
    ],
)
def test_nobody_without_a_key_keeps_the_ingress_waiting(
    method: str,
    path: str,
    status: int,
    ask: Callable[..., httpx.Response],
    replicas: Replicas,
) -> None:
    answer = ask(method, f"http://gem{path}", content=body_that_does_not_end())
    assert answer.status_code == status
    assert [request.body for request in replicas.taken] == ([b""] if status == 200 else [])


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_a_request_may_take(
    ask: Callable[..., httpx.Response], key: dict[str, str]
) -> None:
    answer = ask("POST", "/v1/embeddings", content=body_that_does_not_end(), headers=key)
    assert answer.status_code == 408
    assert answer.headers["connection"] == "close"
    assert "longer than 0.1 s" in answer.json()["error"]["message"]


def test_a_replica_gets_the_path_below_the_route_prefix(
    ask: Callable[..., httpx.Response],
    key: dict[str, str],
    replicas: Replicas,
    counted: Counter[tuple[str, str]],
) -> None:
    for prefix in ("", "/gem"):
        path = f"{prefix}/v1/embeddings?a=%20b"
        assert ask("POST", path, root_path=prefix, headers=key, json={}).status_code == 200
    assert {(request.path, request.query) for request in replicas.taken} == {
        ("/v1/embeddings", b"a=%20b")
    }
    assert counted == {("embed", "200"): 2}


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("no"), "500"), (ClientDisconnect(), "499")]
)
def test_what_breaks_is_counted_as_the_client_sees_it(
    error: Exception,
    code: str,
    ask: Callable[..., httpx.Response],
    key: dict[str, str],
    replicas: Replicas,
    counted: Counter[tuple[str, str]],
) -> None:
    replicas.error = error
    assert ask("POST", "/v1/embeddings", headers=key, json={}).status_code == 500
    assert counted == {("embed", code): 1}


def test_health_is_503_while_serve_or_the_application_is_gone(
    ask: Callable[..., httpx.Response], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_with(error: Exception) -> Callable[[], Any]:
        def fail() -> Any:
            raise error

        return fail

    deleted = SimpleNamespace(applications={})
    half_deleted = SimpleNamespace(applications={"gem": SimpleNamespace(deployments={})})
    for status, message in (
        (fail_with(RayServeException("no controller")), "no controller"),
        (fail_with(RayError("no cluster")), "no cluster"),
        (lambda: deleted, "No replica is running"),
        (lambda: half_deleted, "No replica is running"),
    ):
        monkeypatch.setattr(serve, "status", status)
        answer = ask("GET", "/health")
        assert answer.status_code == 503
        assert message in answer.json()["error"]["message"]
