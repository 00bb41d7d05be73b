"""What an endpoint counts, and the metrics of a whole cluster on one page.

Every process of Ray hands its metrics to its node, which exports them all. `/metrics` of the
endpoint puts together what the nodes export of endpoint and engines, for whoever has one address
to scrape and not the nodes'.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import math
import time
from collections.abc import Iterable

import httpx
import ray
from ray.util.metrics import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gem_vllm.serving.endpoint.lasting_gauge import LastingGauge
from gem_vllm.serving.endpoint.request_facts import OTHER, task_of

logger = logging.getLogger(__name__)

LATENCY_BOUNDARIES = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]
SHOWN = ("ray_gem_", "ray_vllm_")
SCRAPE_SECONDS = 5.0
PAGE_SECONDS = 1.0
# Of one request in the average of the recent ones.
RECENT_SHARE = 0.05
CLIENT_GONE, FAILED = 499, 500
_STATUS = "gem.status"  # in a request's scope, by `count_as`

_open: collections.Counter[str] = collections.Counter()
_seconds = 0.0


def open_requests() -> int:
    """Requests that this process has taken and not answered yet."""
    return _open.total()


def recent_seconds() -> float:
    """What a request that was answered took of late, a moving average; 0 before the first."""
    return _seconds


def count_as(scope: Scope, status: int) -> None:
    """Count a request with a status that its answer, which has begun, cannot give any more."""
    scope[_STATUS] = status


def _note_seconds(seconds: float) -> None:
    global _seconds
    _seconds = seconds if not _seconds else _seconds + (seconds - _seconds) * RECENT_SHARE


class CountRequests:
    """ASGI middleware: `gem_requests`, `gem_request_seconds` and `gem_requests_in_progress`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._requests = Counter(
            "gem_requests", "Requests that were answered.", tag_keys=("task", "code")
        )
        self._seconds = Histogram(
            "gem_request_seconds",
            "Seconds from a request to the end of its answer.",
            boundaries=LATENCY_BOUNDARIES,
            tag_keys=("task",),
        )
        self._in_progress = LastingGauge(
            "gem_requests_in_progress",
            "Requests that were taken and are not answered yet, waiting ones included.",
            tag_keys=("task",),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application; what is neither embedding nor generation is "other"."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = status = CLIENT_GONE

        async def note_status(message: Message) -> None:
            nonlocal begun, status
            await send(message)
            if message["type"] == "http.response.start":
                begun = message["status"]
            elif not message.get("more_body"):
                status = scope.get(_STATUS, begun)

        path = scope["path"].removeprefix(scope.get("root_path", ""))
        task, start = task_of(path), time.monotonic()
        self._change(task, 1)
        try:
            await self._app(scope, receive, note_status)
        except Exception:
            status = FAILED
            raise
        finally:
            self._change(task, -1)
            self._requests.inc(1, {"task": task, "code": str(status)})
            seconds = time.monotonic() - start
            self._seconds.observe(seconds, {"task": task})
            if status < 400 and task != OTHER:
                _note_seconds(seconds)

    def _change(self, task: str, count: int) -> None:
        _open[task] += count
        self._in_progress.set(_open[task], {"task": task})


class ClusterMetrics:
    """The metrics of endpoint and engines from all nodes, gathered for all who ask at a time."""

    def __init__(self) -> None:
        self._gathering = asyncio.Lock()
        self._text, self._gathered_at = "", -math.inf

    async def page(self) -> str:
        """In Prometheus' text format, `PAGE_SECONDS` old at most."""
        async with self._gathering:
            if time.monotonic() - self._gathered_at >= PAGE_SECONDS:
                self._text = await _of_cluster()
                self._gathered_at = time.monotonic()
            return self._text


async def _of_cluster() -> str:
    nodes = await asyncio.to_thread(ray.nodes)
    addresses = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in nodes
        if node["Alive"]
    ]
    async with httpx.AsyncClient(timeout=SCRAPE_SECONDS, trust_env=False) as client:
        pages = await asyncio.gather(
            *(client.get(address) for address in addresses), return_exceptions=True
        )
    texts = []
    for address, page in zip(addresses, pages, strict=True):
        if isinstance(page, httpx.Response):
            texts.append(page.text)
        else:
            logger.warning("no metrics from %s: %r", address, page)
    return await asyncio.to_thread(merge, texts)


def merge(pages: Iterable[str]) -> str:
    """Several exporters' pages as one, of what begins with `SHOWN`.

    A metric has one header, and its samples follow it, wherever they come from.
    """
    headers: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for page in pages:
        name = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                kind, name = line.split(" ", 3)[1:3]
                if name.startswith(SHOWN):
                    headers.setdefault(name, {})[kind] = line
            elif name.startswith(SHOWN) and not line.startswith("#"):
                samples.setdefault(name, []).append(line)
    lines = [
        line
        for name in sorted(headers)
        for line in (*headers[name].values(), *samples.get(name, ()))
    ]
    return "".join(f"{line}\n" for line in lines)
