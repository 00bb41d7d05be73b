"""A replica: Ray's LLM server, whose engine answers through vLLM's own HTTP application.

The replica is an HTTP server itself: what `vllm serve` runs answers here, so that the protocol, its
errors and its routes are vLLM's, behind the door of an endpoint.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ray.serve.llm.deployment import LLMServer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.door import Door, Limits
from gem_vllm.serving.endpoint.engine import GemEngine

logger = logging.getLogger(__name__)


class GemServer(LLMServer):
    """The deployment of an endpoint.

    Args:
        llm_config: Ray's, of engine and deployment.
        limits: of the door.
        api_keys: file of keys; None lets everybody in.
    """

    _default_engine_cls = GemEngine

    # Serve awaits it.
    async def __init__(  # type: ignore[misc]
        self, llm_config: Any, limits: Limits, api_keys: Path | None
    ) -> None:
        self._limits, self._api_keys = limits, api_keys
        await super().__init__(llm_config)

    async def _start_engine(self) -> None:
        # Ray's own also starts an actor that reports the model to Ray's usage statistics.
        await self.engine.start()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """vLLM's application, behind the door; called by Serve once the engine runs."""
        app = await super().__serve_build_asgi_app__()
        around = {each.cls: each.kwargs for each in app.user_middleware}
        cors = around.get(CORSMiddleware)
        self._door = Door(_EndWithEngine(app), self._limits, self._api_keys, cors)
        return metrics.CountRequests(self._door)

    def drain(self) -> None:
        """From now on, take no request; those that were taken are answered."""
        self._door.drain()

    def open_requests(self) -> int:
        """Requests that were taken and are not answered yet."""
        return metrics.open_requests()


class _EndWithEngine:
    """vLLM's application, in a process that ends when its engine is dead, as `vllm serve` does.

    What it was working on is lost either way. So the proxy gives what is not answered yet to
    another replica at once, and Serve starts a new one, instead of sending requests here until a
    health check.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_if_alive(message: Message) -> None:
            # Set by vLLM's handlers of errors, before they answer.
            if getattr(self._app.state.server, "should_exit", False):
                logger.error("the engine is dead; this replica ends")
                os._exit(1)
            await send(message)

        await self._app(scope, receive, send_if_alive)
