"""The demo's side of the OpenAI API: concurrent embeddings, streamed chat, step counts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from gem_vllm.demo.retrieval import Embeddings
from gem_vllm.demo.server import SERVED_NAME
from gem_vllm.errors import GemError

STEPS_METRIC = "gem_steps_total"
MAX_ANSWER_TOKENS = 80


@dataclass
class Totals:
    """What went through the server."""

    texts: int = 0
    tokens: int = 0


class Client:
    """Requests to one server. Use as an async context manager."""

    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._http = httpx.AsyncClient(
            base_url=url, timeout=300.0, transport=transport, trust_env=False
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def embed(self, texts: Sequence[str], totals: Totals | None = None) -> Embeddings:
        """One ``/v1/embeddings`` request; [n, d]."""
        answer = await self._http.post(
            "/v1/embeddings", json={"model": SERVED_NAME, "input": list(texts)}
        )
        _check(answer)
        body = answer.json()
        if totals:
            totals.texts += len(texts)
            totals.tokens += body["usage"]["prompt_tokens"]
        rows = sorted(body["data"], key=lambda row: row["index"])
        return np.array([row["embedding"] for row in rows], dtype=np.float32)

    async def embed_all(
        self,
        texts: Sequence[str],
        *,
        totals: Totals,
        on_progress: Callable[[int], None],
        per_request: int = 4,
        at_once: int = 8,
    ) -> Embeddings:
        """Embed ``texts`` in concurrent requests, in order; [n, d].

        ``on_progress`` gets the number of texts that a finished request held.
        """
        slots = asyncio.Semaphore(at_once)

        async def embed_slice(at: int) -> Embeddings:
            async with slots:
                rows = await self.embed(texts[at : at + per_request], totals)
            on_progress(len(rows))
            return rows

        slices = (embed_slice(at) for at in range(0, len(texts), per_request))
        return np.concatenate(await asyncio.gather(*slices))

    async def chat(self, messages: list[dict[str, str]], totals: Totals) -> AsyncIterator[str]:
        """One streamed, greedy answer, piece by piece."""
        request = {
            "model": SERVED_NAME,
            "messages": messages,
            "max_tokens": MAX_ANSWER_TOKENS,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._http.stream("POST", "/v1/chat/completions", json=request) as answer:
            if answer.is_error:
                await answer.aread()
            _check(answer)
            async for line in answer.aiter_lines():
                data = line.removeprefix("data: ")
                if not line.startswith("data: ") or data == "[DONE]":
                    continue
                event = json.loads(data)
                if usage := event.get("usage"):
                    totals.texts += 1
                    totals.tokens += usage["completion_tokens"]
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece

    async def step_counts(self) -> dict[str, int]:
        """Engine steps so far, by kind: embed, generate, mixed."""
        answer = await self._http.get("/metrics")
        _check(answer)
        return parse_step_counts(answer.text)


def parse_step_counts(metrics: str) -> dict[str, int]:
    """The counters named `STEPS_METRIC` in Prometheus text, summed over engines, by kind."""
    from prometheus_client.parser import text_string_to_metric_families

    counts: dict[str, int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == STEPS_METRIC:
                kind = sample.labels["kind"]
                counts[kind] = counts.get(kind, 0) + int(sample.value)
    return counts


def _check(answer: httpx.Response) -> None:
    if answer.is_error:
        raise GemError(
            f"the server answered {answer.status_code} to {answer.request.url.path}: {answer.text}"
        )
