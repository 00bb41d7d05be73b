"""A replica: Ray's LLM server, whose engine answers through vLLM's own HTTP application.

Ray's server has a method for each of some routes. This one has two for all of them, for whole and
for streamed answers: the request runs through the application that `vllm serve` runs, so that the
protocol, its errors and its routes are vLLM's.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from ray.serve.llm.deployment import LLMServer

from gem_vllm.serving.endpoint.engine import GemEngine
from gem_vllm.serving.endpoint.messages import ForwardedRequest, ResponseStart

logger = logging.getLogger(__name__)

# What a stream produces meanwhile is sent on together, as Ray's own server does.
STREAM_INTERVAL_S = 0.05
ABORT_GRACE_S = 5.0


class GemServer(LLMServer):
    """`LLMConfig.server_cls` of an endpoint."""

    _default_engine_cls = GemEngine

    async def start(self) -> None:
        """Start the engine, then build vLLM's application around it."""
        await super().start()
        self._app = await self.__serve_build_asgi_app__()

    async def _start_engine(self) -> None:
        # Ray's own also starts an actor that reports the model to Ray's usage statistics.
        await self.engine.start()

    async def answer(self, request: ForwardedRequest) -> ResponseStart:
        """Answer a request, with its whole body."""
        async with self._exchange(request) as exchange:
            whole, _ = await exchange.begin(wait_for_all=True)
            self._exit_with_engine()
            return whole

    async def stream(self, request: ForwardedRequest) -> AsyncIterator[ResponseStart | bytes]:
        """Answer a request: its start, then, where the answer is a stream, the rest of it."""
        async with self._exchange(request) as exchange:
            async for part in exchange.parts():
                self._exit_with_engine()
                yield part

    @asynccontextmanager
    async def _exchange(self, request: ForwardedRequest) -> AsyncIterator[_Exchange]:
        """A request that vLLM's application answers meanwhile.

        A caller that stops listening looks to vLLM like a client that has gone: it aborts the
        request, which frees its KV blocks.
        """
        exchange = _Exchange(request)
        task = asyncio.create_task(exchange.run(self._app))
        try:
            yield exchange
        finally:
            exchange.gone.set()
            await asyncio.wait([task], timeout=ABORT_GRACE_S)
            task.cancel()

    def _exit_with_engine(self) -> None:
        """End this process if its engine is dead, as `vllm serve` does.

        What it was working on is lost either way. So the ingress gives it to another replica at
        once, and Serve starts a new one, instead of sending requests here until a health check.
        """
        if getattr(self._app.state.server, "should_exit", False):
            logger.error("the engine is dead; this replica ends")
            os._exit(1)


class _Exchange:
    """One request and answer as an ASGI application sees them."""

    def __init__(self, request: ForwardedRequest) -> None:
        self._request = request
        self._body_is_read = False
        self._messages: asyncio.Queue[dict[str, Any] | BaseException] = asyncio.Queue()
        self.gone = asyncio.Event()

    async def run(self, app: Any) -> None:
        """Run the application; an exception that it raises reaches `parts`."""
        request = self._request
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.path,
            "raw_path": request.path.encode(),
            "query_string": request.query,
            "root_path": "",
            "headers": request.headers,
            "client": None,
            "server": None,
            "state": {},
        }
        try:
            await app(scope, self._receive, self._send)
        except Exception as error:
            self._messages.put_nowait(error)

    async def _receive(self) -> dict[str, Any]:
        if not self._body_is_read:
            self._body_is_read = True
            return {"type": "http.request", "body": self._request.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self._messages.put_nowait(message)

    async def begin(self, *, wait_for_all: bool) -> tuple[ResponseStart, bool]:
        """The answer's start, and whether more will come: only of a stream, unless waited for."""
        message = await self._next()
        headers = [(bytes(name), bytes(value)) for name, value in message["headers"]]
        start = ResponseStart(message["status"], headers, b"")
        body, more = await self._body(wait_for_all=wait_for_all or not start.streamed)
        return replace(start, body=body), more

    async def parts(self) -> AsyncIterator[ResponseStart | bytes]:
        """The answer: its start with the whole body, or with the first part of a stream."""
        start, more = await self.begin(wait_for_all=False)
        yield start
        while more:
            await asyncio.sleep(STREAM_INTERVAL_S)
            body, more = await self._body(wait_for_all=False)
            if body:
                yield body

    async def _body(self, *, wait_for_all: bool) -> tuple[bytes, bool]:
        """What there is of the body, at least one message of it, and whether more will come."""
        chunks: list[bytes] = []
        more = True
        while more and (wait_for_all or not chunks or not self._messages.empty()):
            message = await self._next()
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(chunks), more

    async def _next(self) -> dict[str, Any]:
        message = await self._messages.get()
        if isinstance(message, BaseException):
            raise message
        return message
