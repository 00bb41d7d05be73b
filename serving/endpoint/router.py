"""The process that HAProxy asks which replica a request goes to; the request itself it sends there.

As `ray.serve.llm` has it for chats and completions, here for every route and task.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, HTTPException, Request
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from gem_vllm.serving.endpoint.request_facts import parse_body, routing_text

api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


# The last thing in this module: the decorator takes a copy of the module as it finds it.
@serve.ingress(api)
class Router:
    """The ingress request router (Ray Serve's term) of an endpoint, beside every proxy.

    Args:
        replicas: the deployment of `server.GemServer`, with its `PrefixRouting`.
        max_body_bytes: of a request that is read; its port is open to whoever reaches the node.
    """

    def __init__(self, replicas: DeploymentHandle[Any], max_body_bytes: int) -> None:
        self._replicas, self._max_body_bytes = replicas, max_body_bytes
        self._replicas._init()

    @api.post("/internal/route")
    async def route(self, request: Request) -> dict[str, Any]:
        """The replica for a request, whose body this is, or the beginning of a longer one.

        Of a body that is cut off no text can be read: it goes by load alone, and so does one that
        no replica would take.
        """
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._max_body_bytes:
                break
        parsed = parse_body(bytes(body))
        text = None if parsed is None else routing_text(parsed)
        try:
            async with self._replicas.choose_replica(text, _reserve=False) as selection:
                replica = selection._replica
        except DeploymentUnavailableError as error:
            raise HTTPException(503, str(error)) from error
        if replica.backend_http_endpoint is None:
            raise HTTPException(503, f"{replica.replica_id} has no HTTP server yet")
        host, port = replica.backend_http_endpoint
        return {"host": host, "port": port, "replica_id": replica.replica_id.to_full_id_str()}
