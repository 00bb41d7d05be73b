"""The client of `endpoint.py`: a fixed number of HTTP requests, so many of them in flight.

One process and one thread, the same for every server; it shares the cores with them. It looks into
an answer only as far as it must: for the first token of a stream, and for the mark of a whole
answer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import aiohttp

from gem_vllm.errors import GemError

PATHS = {
    "embed": "/v1/embeddings",
    "chat": "/v1/chat/completions",
    "stream": "/v1/chat/completions",
}
# In every answer that is whole.
MARKS = {
    "embed": b'"embedding":',
    "chat": b'"finish_reason":"length"',
    "stream": b'"finish_reason":"length"',
}
TIMEOUT_SECONDS = 300.0
# Behind a line of a stream.
EVENT = b"data: "


@dataclass(frozen=True)
class Load:
    """Requests of one task to one server.

    Attributes:
        url: of the server.
        task: "embed", "chat" or "stream".
        bodies: of requests; from the start again where there are fewer than `amount`.
        amount: of requests.
        in_flight: at most, and until none is left, always.
    """

    url: str
    task: str
    bodies: Sequence[bytes]
    amount: int
    in_flight: int


@dataclass(frozen=True)
class Outcome:
    """What became of the loads that ran together.

    Attributes:
        seconds: from the first request to the last answer.
        first_token: seconds from a request to its first text, of each stream.
    """

    seconds: float
    first_token: list[float]


def bodies_of(task: str, texts: Sequence[str], model: str, max_tokens: int) -> list[bytes]:
    """A request for each text; embeddings as base64, as the `openai` library asks for them."""
    if task == "embed":
        requests = [{"input": text, "encoding_format": "base64"} for text in texts]
    else:
        requests = [
            {
                "messages": [{"role": "user", "content": text}],
                "max_tokens": max_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": task == "stream",
            }
            for text in texts
        ]
    return [json.dumps({"model": model, **request}).encode() for request in requests]


def run(loads: Sequence[Load]) -> Outcome:
    """Run loads side by side, to the end of the last.

    Raises:
        GemError: a request was not answered in full.
    """
    return asyncio.run(_run(loads))


async def _run(loads: Sequence[Load]) -> Outcome:
    first_token: list[float] = []
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_SECONDS),
        headers={"Content-Type": "application/json"},
    ) as session:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for load in loads:
                waiting = islice(cycle(load.bodies), load.amount)
                for _ in range(min(load.in_flight, load.amount)):
                    clients.create_task(_client(session, load, waiting, first_token))
        return Outcome(time.perf_counter() - start, first_token)


async def _client(
    session: aiohttp.ClientSession, load: Load, waiting: Iterator[bytes], first_token: list[float]
) -> None:
    """One request after the other, of those that all clients of a load share."""
    for body in waiting:
        start = time.perf_counter()
        async with session.post(load.url + PATHS[load.task], data=body) as response:
            if load.task == "stream" and response.ok:
                await _first_text(response)
                first_token.append(time.perf_counter() - start)
            answer = await response.read()
        if not response.ok or MARKS[load.task] not in answer:
            raise GemError(f"{load.task}: {response.status} {answer[:300]!r}")


async def _first_text(response: aiohttp.ClientResponse) -> None:
    """Read a stream to the first event that has text in it."""
    async for line in response.content:
        if line.startswith(EVENT) and has_text(line.removeprefix(EVENT)):
            return


def has_text(event: bytes) -> bool:
    """Whether an event of a streamed chat has some of the answer's text."""
    if event.strip() == b"[DONE]":
        return False
    choices = json.loads(event).get("choices", [])
    return any(choice["delta"].get("content") for choice in choices)
