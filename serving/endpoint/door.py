"""The door of a replica, around vLLM's own HTTP application: keys, limits, a queue, an end."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi.responses import JSONResponse, Response
from ray.util.metrics import Gauge
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.keys import KeyFile
from gem_vllm.serving.endpoint.request_facts import count_inputs, parse_body

ABORT_GRACE_S = 5.0
RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 30
POLICY_VIOLATION = 1008  # of a closed websocket (RFC 6455, 7.4.1)
# GET and HEAD of these are answered without a key, as OPTIONS is (a browser asks with it, and sends
# none): they compute nothing.
OPEN_PATHS = {"/health", "/ping", "/version", "/metrics"}
STREAM = b"text/event-stream"


@dataclass(frozen=True)
class Limits:
    """Of a request, and of the requests at one replica; see `EndpointOptions`."""

    request_timeout_s: float
    max_inputs: int
    max_body_bytes: int
    max_ongoing_requests: int
    max_queued_requests: int


class Refused(Exception):
    """A request that goes no further.

    Args:
        status: of the answer.
        message: in its body, as vLLM's errors are.
        headers: of the answer.
    """

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers

    def response(self) -> JSONResponse:
        """The answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": None, "code": self.status}
        return JSONResponse({"error": error}, self.status, self.headers)


class Door:
    """ASGI application: vLLM's, for those requests that may pass.

    Args:
        app: vLLM's application.
        limits: of a request, and of those that are here.
        api_keys: file of keys; None lets everybody in.
    """

    def __init__(self, app: ASGIApp, limits: Limits, api_keys: Path | None) -> None:
        self._app, self._limits = app, limits
        self._keys = None if api_keys is None else KeyFile(api_keys)
        self._turns = asyncio.Semaphore(limits.max_ongoing_requests)
        self._waiting = 0
        self._waiting_gauge = Gauge(
            "gem_requests_waiting", "Requests that wait at a replica for their turn."
        )
        self._draining = False

    def drain(self) -> None:
        """From now on, take no request; those that were taken are answered."""
        self._draining = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, with vLLM's answer or with a refusal.

        A websocket is closed: what is sent over one could not be checked.
        """
        if scope["type"] == "http":
            answer = _Answer(scope, send)
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

    async def _let_in(self, request: Request, answer: _Answer) -> None:
        if self._draining:
            raise _come_back(503, "The endpoint is shutting down.")
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        reads = request.method in ("GET", "HEAD")
        if reads and path == "/metrics":
            page = Response(await metrics.of_cluster(), media_type="text/plain; version=0.0.4")
            await page(request.scope, request.receive, answer.send)
        elif (reads and path in OPEN_PATHS) or request.method == "OPTIONS":
            await self._app(request.scope, request.receive, answer.send)
        else:
            await self._compute(request, answer)

    async def _compute(self, request: Request, answer: _Answer) -> None:
        """Answer a request that costs something: with a key, within the limits, in its turn."""
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s
        self._check_key(request)
        body = await self._read(request, deadline)
        self._check_inputs(body)
        try:
            async with asyncio.timeout_at(deadline) as limit, self._turn():
                await self._ask_vllm(request, body, answer)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise _come_back(504, self._too_long()) from error

    async def _ask_vllm(self, request: Request, body: bytes, answer: _Answer) -> None:
        """Have vLLM answer; where that is cancelled, tell it that the client has gone.

        It then aborts the request, which frees its KV blocks. Its handlers of requests, cancelled,
        leave the engine at work.
        """
        connection = _Connection(body, request.receive)
        task = asyncio.create_task(self._app(request.scope, connection.receive, answer.send))
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
            if self._waiting >= self._limits.max_queued_requests:
                raise _come_back(429, "The replica is busy, and its queue is full.")
            await self._wait()
        else:
            await self._turns.acquire()  # at once
        try:
            yield
        finally:
            self._turns.release()

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


class _Answer:
    """What is sent to a client, as far as it has been sent.

    Args:
        scope: of the request.
        send: ASGI's.
    """

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._begun = self._streamed = self._ended = False

    def end(self) -> None:
        """Send no more of vLLM's answer."""
        self._ended = True

    async def send(self, message: Message) -> None:
        """Send a message on."""
        if self._ended:
            return
        if message["type"] == "http.response.start":
            self._begun = True
            self._streamed = any(
                name.lower() == b"content-type" and value.startswith(STREAM)
                for name, value in message["headers"]
            )
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        """End with a refusal; where a stream has begun, with an error event.

        Raises:
            Refused: an answer that is no stream has begun; its client sees that it breaks off.
        """
        if not self._begun:
            await refused.response()(self._scope, _nothing_more, self._send)
            return
        if not self._streamed:
            raise refused
        metrics.count_as(self._scope, refused.status)
        event = b"data: " + bytes(refused.response().body) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


def _come_back(status: int, message: str) -> Refused:
    """A refusal with Retry-After: by then, about as much is done as is being done now."""
    seconds = min(max(RETRY_AFTER_S, math.ceil(metrics.recent_seconds())), MAX_RETRY_AFTER_S)
    return Refused(status, message, {"Retry-After": str(seconds)})


class _Connection:
    """A client as vLLM sees it: a body that was read already, then the end, whoever makes it.

    Args:
        body: of the request.
        receive: ASGI's, behind the body.
    """

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive
        self._ended = asyncio.Event()

    def end(self) -> None:
        """From now on the client has gone."""
        self._ended.set()

    async def receive(self) -> Message:
        """The body; after it, once there is one, the end."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        ways = [asyncio.ensure_future(self._receive()), asyncio.ensure_future(self._ended.wait())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self._ended.is_set() else ways[0].result()
        finally:
            for way in ways:
                way.cancel()


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}
