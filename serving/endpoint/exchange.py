"""A request's two ends at the door: what vLLM hears of its client, and the client of vLLM."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gem_vllm.serving.endpoint import metrics

RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 30
STREAM = b"text/event-stream"


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


def come_back(status: int, message: str) -> Refused:
    """A refusal with Retry-After: by then, about as much is done as is being done now."""
    seconds = min(max(RETRY_AFTER_S, math.ceil(metrics.recent_seconds())), MAX_RETRY_AFTER_S)
    return Refused(status, message, {"Retry-After": str(seconds)})


class Answer:
    """What is sent to a client, as far as it has been sent.

    Args:
        scope: of the request.
        send: ASGI's.
        cors: arguments of the `CORSMiddleware` that is around vLLM's answers, for refusals, too:
            without, a page in a browser does not get to see them.
    """

    def __init__(self, scope: Scope, send: Send, cors: Mapping[str, Any] | None) -> None:
        self._scope, self._send, self._cors = scope, send, cors
        self._begun = self._streamed = self._whole = self._ended = False

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
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self._whole = True

    async def refuse(self, refused: Refused) -> None:
        """End with a refusal; where a stream has begun, with an error event.

        An answer that was sent as a whole, just before its time was over, stays as it is.

        Raises:
            Refused: an answer has begun that is no stream and not whole; its client sees that it
                breaks off.
        """
        if not self._begun:
            response: ASGIApp = refused.response()
            if self._cors is not None:
                response = CORSMiddleware(response, **self._cors)
            await response(self._scope, _nothing_more, self._send)
            return
        if self._whole:
            return
        if not self._streamed:
            raise refused
        metrics.count_as(self._scope, refused.status)
        event = b"data: " + bytes(refused.response().body) + b"\n\ndata: [DONE]\n\n"
        await self._send({"type": "http.response.body", "body": event, "more_body": False})


class Connection:
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
        received = asyncio.ensure_future(self._receive())
        ended = asyncio.ensure_future(self._ended.wait())
        try:
            await asyncio.wait([received, ended], return_when=asyncio.FIRST_COMPLETED)
            return {"type": "http.disconnect"} if self._ended.is_set() else received.result()
        finally:
            received.cancel()
            ended.cancel()


async def _nothing_more() -> Message:
    return {"type": "http.disconnect"}
