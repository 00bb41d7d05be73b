"""What HAProxy's router reads of a request, and where it has none to send it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.requests import Request

from gem_vllm.serving.endpoint.router import Router

PART = 1000


@pytest.mark.parametrize(("limit", "is_read"), [(10_000, True), (4000, False)])
def test_a_body_that_no_replica_would_take_is_not_held(limit: int, is_read: bool) -> None:
    asked_for: list[Any] = []
    received = 0

    @asynccontextmanager
    async def choose_replica(text: str | None, **_: Any) -> AsyncIterator[Any]:
        asked_for.append(text)
        where = SimpleNamespace(to_full_id_str=lambda: "gem#1")
        yield SimpleNamespace(
            _replica=SimpleNamespace(backend_http_endpoint=("10.0.0.1", 30001), replica_id=where)
        )

    body = json.dumps({"model": "gem", "input": "a river " * 1000}).encode()

    async def receive() -> dict[str, Any]:
        nonlocal received
        part = body[received : received + PART]
        received += len(part)
        return {"type": "http.request", "body": part, "more_body": received < len(body)}

    router = SimpleNamespace(
        _replicas=SimpleNamespace(choose_replica=choose_replica), _max_body_bytes=limit
    )
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    answer = asyncio.run(Router.route(router, request))
    assert answer == {"host": "10.0.0.1", "port": 30001, "replica_id": "gem#1"}
    assert (asked_for != [None]) == is_read
    assert received <= limit + PART


@pytest.mark.parametrize(
    ("failed", "told"), [(False, "gem#1 has no HTTP server yet"), (True, "GemServer")]
)
def test_where_no_replica_can_be_asked_the_answer_is_503(failed: bool, told: str) -> None:
    @asynccontextmanager
    async def choose_replica(text: str | None, **_: Any) -> AsyncIterator[Any]:
        if failed:
            raise DeploymentUnavailableError(DeploymentID("GemServer"))
        yield SimpleNamespace(
            _replica=SimpleNamespace(backend_http_endpoint=None, replica_id="gem#1")
        )

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    router = SimpleNamespace(
        _replicas=SimpleNamespace(choose_replica=choose_replica), _max_body_bytes=1000
    )
    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(HTTPException) as refused:
        asyncio.run(Router.route(router, request))
    assert refused.value.status_code == 503
    assert told in refused.value.detail
