"""The door of a replica, around vLLM's own HTTP application: keys, limits, a queue, an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi.responses import Response
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.exchange import Answer, Connection, Refused, come_back
from gem_vllm.serving.endpoint.keys import KeyFile
from gem_vllm.serving.endpoint.lasting_gauge import LastingGauge
from gem_vllm.serving.endpoint.request_facts import count_inputs, parse_body

ABORT_GRACE_S = 5.0
POLICY_VIOLATION = 1008  # of a closed websocket (RFC 6455, 7.4.1)
# GET and HEAD of these are answered without a key, as OPTIONS is (a browser asks with it, and sends
# none): they compute nothing.
OPEN_PATHS = {"/health", "/ping", "/version", "/metrics"}


@dataclass(frozen=True)
class Limits:
    """Of a request, and of the requests at one replica; see `EndpointOptions`."""

    request_timeout_s: float
    max_inputs: int
    max_body_bytes: int
    max_ongoing_requests: int
    max_queued_requests: int


class Door:
    """ASGI application: vLLM's, for those requests that may pass.

    Args:
        app: vLLM's application.
        limits: of a request, and of those that are here.
        api_keys: file of keys; None lets everybody in.
        cors: see `Answer`.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        api_keys: Path | None,
        cors: Mapping[str, Any] | None = None,
    ) -> None:
        self._app, self._limits, self._cors = app, limits, cors
        self._keys = None if api_keys is None else KeyFile(api_keys)
        self._turns = asyncio.Semaphore(limits.max_ongoing_requests)
        self._waiting = 0
        self._waiting_gauge = LastingGauge(
            "gem_requests_waiting", "Requests that wait at a replica for their turn."
        )
        self._metrics = metrics.ClusterMetrics()
        self._draining = False

    def drain(self) -> None:
        """From now on, take no request; those that were taken are answered."""
        self._draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with vLLM's answer or with a refusal.

        A websocket is closed: what is sent over one could not be checked.
        """
        if scope["type"] == "http":
            answer = Answer(scope, send, self._cors)
            try:
                await self._let_in(Request(scope, receive), answer)
            except Refused as refused:
                await answer.refuse(refused)
            except ClientDisconnect:
                return  # before its request was whole
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
        else:
            await self._app(scope, receive, send)

    async def _let_in(self, request: Request, answer: Answer) -> None:
        if self._draining:
            raise come_back(503, "The endpoint is shutting down.")
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        reads = request.method in ("GET", "HEAD")
        if reads and path == "/metrics":
            page = Response(await self._metrics.page(), media_type="text/plain; version=0.0.4")
            await page(request.scope, request.receive, answer.send)
        elif (reads and path in OPEN_PATHS) or request.method == "OPTIONS":
            await self._app(request.scope, request.receive, answer.send)
        else:
            await self._compute(request, answer)

    async def _compute(self, request: Request, answer: Answer) -> None:
        """Answer a request that costs something: with a key, within the limits, in its turn."""
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s
        self._check_key(request)
        self._check_queue()
        body = await self._read(request, deadline)
        self._check_inputs(body)
        try:
            async with asyncio.timeout_at(deadline) as limit, self._turn():
                await self._ask_vllm(request, body, answer)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise come_back(504, self._too_long()) from error

    async def _ask_vllm(self, request: Request, body: bytes, answer: Answer) -> None:
        """Have vLLM answer; where that is cancelled, tell it that the client has gone.

        It then aborts the request, which frees its KV blocks. Its handlers of requests, cancelled,
        leave the engine at work.
        """
        connection = Connection(body, request.receive)
        task = asyncio.ensure_future(self._app(request.scope, connection.receive, answer.send))
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            answer.end()
            connection.end()
            try:
                await asyncio.wait([task], timeout=ABORT_GRACE_S)
            finally:
                task.cancel()
            raise
        task.result()

    def _check_key(self, request: Request) -> None:
        if self._keys is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or self._keys.name_of(key.strip()) is None:
            raise Refused(
                401,
                "Send a valid API key, as 'Authorization: Bearer KEY'.",
                {"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, request: Request, deadline: float) -> bytes:
        """The body of a request, no larger and no later than the limits are."""
        limit = self._limits.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout_at(deadline):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise Refused(
                            413,
                            f"The request is larger than {limit} bytes. Send it in parts.",
                            {"Connection": "close"},
                        )
        except TimeoutError as error:
            raise Refused(408, self._too_long(), {"Connection": "close"}) from error
        return bytes(body)

    def _check_inputs(self, body: bytes) -> None:
        if len(body) < 2 * self._limits.max_inputs:
            return  # An input and its comma are two bytes at least: it need not be read.
        parsed = parse_body(body)
        if parsed is not None and (count := count_inputs(parsed)) > self._limits.max_inputs:
            raise Refused(
                400,
                f"The request has {count} inputs; at most {self._limits.max_inputs} are taken at "
                "once. Send them in several requests.",
            )

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until one more request may be worked on, unless too many wait already."""
        if self._turns.locked():
            self._check_queue()
            await self._wait()
        else:
            await self._turns.acquire()  # at once
        try:
            yield
        finally:
            self._turns.release()

    def _check_queue(self) -> None:
        """Refuse a request that could not wait: before its body is read, and when it is to wait."""
        if self._turns.locked() and self._waiting >= self._limits.max_queued_requests:
            raise come_back(429, "The replica is busy, and its queue is full.")

    async def _wait(self) -> None:
        self._note_waiting(1)
        try:
            await self._turns.acquire()
        finally:
            self._note_waiting(-1)

    def _note_waiting(self, count: int) -> None:
        self._waiting += count
        self._waiting_gauge.set(self._waiting)

    def _too_long(self) -> str:
        return f"The request took longer than {self._limits.request_timeout_s:g} s."
