"""The door of an endpoint: keys, limits and queues; what passes goes to a replica as it is."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
)
from ray.serve.handle import DeploymentHandle

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.keys import KeyFile
from gem_vllm.serving.endpoint.messages import (
    ForwardedRequest,
    Headers,
    ResponseStart,
    count_inputs,
    parse_body,
    routing_text,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 30
HEALTH_SECONDS = 5.0
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
# GET and HEAD of these are answered without a key, as OPTIONS is (a browser asks with it, and sends
# none): they compute nothing.
OPEN_PATHS = {"/health", "/ping", "/version", "/metrics"}
# Of one connection (RFC 9110, 7.6.1), or meant for the ingress alone.
_DROPPED_HEADERS = {
    b"authorization",
    b"connection",
    b"content-length",
    b"host",
    b"keep-alive",
    b"proxy-connection",
    b"te",
    b"trailer",
    b"transfer-encoding",
    b"upgrade",
}

LOST = "The replica was lost. Send the request again."

api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
api.add_middleware(metrics.CountRequests)


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; see `EndpointOptions`."""

    request_timeout_s: float
    max_inputs: int
    max_body_bytes: int


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


def _come_back(status: int, message: str, headers: dict[str, str] | None = None) -> Refused:
    """A refusal with Retry-After: by then, about as much is done as is being done now."""
    seconds = min(max(RETRY_AFTER_S, math.ceil(metrics.recent_seconds())), MAX_RETRY_AFTER_S)
    return Refused(status, message, {"Retry-After": str(seconds), **(headers or {})})


class _Relay(StreamingResponse):
    """A stream from a replica, which stops when this one does, for whatever reason."""

    def __init__(self, body: AsyncIterator[bytes], parts: Any, status: int) -> None:
        super().__init__(body, status)
        self._parts = parts

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        finally:
            self._parts.cancel()


def _kept(headers: Any) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in _DROPPED_HEADERS]


def _path(request: Request) -> str:
    """The path that vLLM knows: what follows the application's route prefix."""
    return f"/{request.path_params['path']}"


def _is_open(request: Request) -> bool:
    """Whether a request is answered without a key, and without its body."""
    if request.method in ("GET", "HEAD"):
        return _path(request) in OPEN_PATHS
    return request.method == "OPTIONS"


def _error_event(request: Request, refused: Refused) -> bytes:
    metrics.count_as(request.scope, refused.status)
    return b"data: " + bytes(refused.response().body) + b"\n\ndata: [DONE]\n\n"


# The last thing in this module: the decorator takes a copy of the module as it finds it.
@serve.ingress(api)
class Ingress:
    """A Serve deployment in front of the replicas of one checkpoint.

    Args:
        replicas: the deployment of `server.GemServer`.
        limits: of a request.
        api_keys: file of keys; None lets everybody in.
    """

    def __init__(
        self, replicas: DeploymentHandle[Any], limits: Limits, api_keys: Path | None
    ) -> None:
        self._replicas = replicas
        self._whole = replicas.options(method_name="answer")
        self._stream = replicas.options(method_name="stream", stream=True)
        self._limits = limits
        self._keys = None if api_keys is None else KeyFile(api_keys)
        self._draining = False

    def drain(self) -> None:
        """From now on, take no request; those that were taken are answered."""
        self._draining = True

    def open_requests(self) -> int:
        """Requests that were taken and are not answered yet."""
        return metrics.open_requests()

    @api.get("/health")
    async def health(self) -> Response:
        """200 while requests are taken and a replica passes the controller's health checks."""
        if self._draining:
            return Refused(503, "The endpoint is shutting down.").response()
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                status = await asyncio.to_thread(serve.status)
        except (TimeoutError, RayError, RayServeException) as error:
            return Refused(503, f"Ray Serve does not answer: {error}").response()
        # While the application is deleted, it or its replicas are missing already.
        application = status.applications.get(self._replicas.app_name)
        deployments = {} if application is None else application.deployments
        deployment = deployments.get(self._replicas.deployment_name)
        running = 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)
        if not running:
            return Refused(503, "No replica is running.").response()
        return JSONResponse({"replicas": running})

    @api.get("/metrics")
    async def show_metrics(self) -> Response:
        """What all nodes of the cluster export of this endpoint and its engines."""
        return Response(await metrics.of_cluster(), media_type="text/plain; version=0.0.4")

    @api.api_route("/{path:path}", methods=METHODS)
    async def forward(self, request: Request) -> Response:
        """Every other route: vLLM's, on a replica."""
        try:
            return await self._answer(request)
        except Refused as refused:
            return refused.response()

    async def _answer(self, request: Request) -> Response:
        if self._draining:
            raise _come_back(503, "The endpoint is shutting down.", {"Connection": "close"})
        deadline = asyncio.get_running_loop().time() + self._limits.request_timeout_s
        body = b""
        if not _is_open(request):
            self._check_key(request)
            body = await self._read(request, deadline)
        forwarded = self._admit(request, body)
        parts, first = await self._begin(forwarded, deadline)
        if forwarded.streamed and first.streamed:
            rest = self._rest(request, first, parts, deadline)
            response: Response = _Relay(rest, parts, first.status)
        else:
            response = Response(first.body, first.status)
        response.raw_headers.extend(_kept(first.headers))
        return response

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

    def _admit(self, request: Request, body: bytes) -> ForwardedRequest:
        """A request as a replica gets it, if it has no more inputs than the limit is."""
        parsed = parse_body(body) if body else None
        if parsed is not None and (count := count_inputs(parsed)) > self._limits.max_inputs:
            raise Refused(
                400,
                f"The request has {count} inputs; at most {self._limits.max_inputs} are taken at "
                "once. Send them in several requests.",
            )
        return ForwardedRequest(
            method=request.method,
            path=_path(request),
            query=request.scope["query_string"],
            headers=[*_kept(request.headers.raw), (b"content-length", str(len(body)).encode())],
            body=body,
            routing_text=None if parsed is None else routing_text(parsed),
            streamed=parsed is not None and bool(parsed.get("stream")),
        )

    async def _begin(self, request: ForwardedRequest, deadline: float) -> tuple[Any, ResponseStart]:
        """A replica's answer, to be cancelled or gone on with, and the first part of it.

        A replica that dies before it has said anything costs its requests a second try, on
        another: what they ask for is computed, and changes nothing.
        """
        try:
            return await self._try(request, deadline)
        except (RayActorError, DeploymentUnavailableError) as error:
            logger.warning("a replica was lost, its request goes to another: %s", error)
        try:
            return await self._try(request, deadline)
        except (RayActorError, DeploymentUnavailableError) as error:
            raise _come_back(503, LOST) from error

    async def _try(self, request: ForwardedRequest, deadline: float) -> tuple[Any, ResponseStart]:
        parts: Any = (self._stream if request.streamed else self._whole).remote(request)
        try:
            async with asyncio.timeout_at(deadline):
                return parts, await (anext(parts) if request.streamed else parts)
        except BackPressureError as error:
            raise _come_back(429, "All replicas are busy, and the queue is full.") from error
        except TimeoutError as error:
            parts.cancel()
            raise _come_back(504, self._too_long()) from error
        except asyncio.CancelledError:
            # The client has gone.
            parts.cancel()
            raise

    async def _rest(
        self, request: Request, first: ResponseStart, parts: Any, deadline: float
    ) -> AsyncIterator[bytes]:
        """A streamed body; of one that cannot be finished, the end is an error event."""
        yield first.body
        try:
            async with asyncio.timeout_at(deadline):
                async for part in parts:
                    yield part
        except TimeoutError:
            yield _error_event(request, Refused(504, self._too_long()))
        except RayActorError as error:
            logger.warning("a replica was lost in the middle of a stream: %s", error)
            yield _error_event(request, Refused(503, LOST))

    def _too_long(self) -> str:
        return f"The request took longer than {self._limits.request_timeout_s:g} s."
