"""The door without Ray: what it lets in, how many at once, what it passes on and what it counts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gem_vllm.serving.endpoint import door as door_module
from gem_vllm.serving.endpoint import metrics
from gem_vllm.serving.endpoint.door import Door, Limits
from gem_vllm.serving.endpoint.exchange import Refused
from gem_vllm.serving.endpoint.keys import new_key

LIMITS = Limits(
    request_timeout_s=60,
    max_inputs=16,
    max_body_bytes=1000,
    max_ongoing_requests=2,
    max_queued_requests=3,
)
# For requests that have no end but this.
SHORT = replace(LIMITS, request_timeout_s=1)
Ask = Callable[..., httpx.Response]


class Application:
    """In vLLM's place: keeps what it is sent, and answers as it is told to.

    Attributes:
        taken: path, query and body of each request.
        error: to raise.
        answer: of a POST.
    """

    def __init__(self) -> None:
        self.taken: list[tuple[str, str, bytes]] = []
        self.error: Exception | None = None
        self.answer: Callable[[], Any] = dict
        self.api = FastAPI(docs_url=None)
        self.api.api_route("/{path:path}", methods=["GET", "HEAD", "OPTIONS"])(self.read)
        self.api.api_route("/{path:path}", methods=["POST", "DELETE"])(self.compute)

    async def read(self, path: str) -> Any:
        self.taken.append((f"/{path}", "", b""))
        return {}

    async def compute(self, path: str, request: Request) -> Any:
        self.taken.append((f"/{path}", request.url.query, await request.body()))
        if self.error is not None:
            raise self.error
        return self.answer()


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def gauges() -> dict[str, list[float]]:
    """What each gauge was set to, one value behind the other, by its name and its task."""
    return defaultdict(list)


@pytest.fixture(autouse=True)
def counted(
    monkeypatch: pytest.MonkeyPatch, gauges: dict[str, list[float]]
) -> Iterator[Counter[tuple[str, str]]]:
    """Requests by task and status, instead of Ray's metrics; none is open at the end."""
    counts: Counter[tuple[str, str]] = Counter()

    class Metric:
        def __init__(self, name: str, *_: Any, **__: Any) -> None:
            self._name = name

        def inc(self, _: int, tags: dict[str, str]) -> None:
            counts[tags["task"], tags["code"]] += 1

        def set(self, value: float, tags: dict[str, str] | None = None) -> None:
            assert value >= 0
            gauges[" ".join((self._name, *(tags or {}).values()))].append(value)

        def observe(self, value: float, tags: dict[str, str]) -> None:
            assert value >= 0

    for name in ("Counter", "LastingGauge", "Histogram"):
        monkeypatch.setattr(metrics, name, Metric)
    monkeypatch.setattr(door_module, "LastingGauge", Metric)
    monkeypatch.setattr(door_module, "ABORT_GRACE_S", 0.1)
    before = metrics.open_requests()
    yield counts
    assert metrics.open_requests() == before
    assert {name: values[-1] for name, values in gauges.items()} == dict.fromkeys(gauges, 0)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    new_key(tmp_path / "keys", "a")
    return tmp_path / "keys"


@pytest.fixture
def key(keys: Path) -> dict[str, str]:
    """Headers with a key that is let in."""
    return {"Authorization": f"Bearer {new_key(keys, 'b')}"}


def client_of(door: Door, *, root_path: str = "") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(
        metrics.CountRequests(door), raise_app_exceptions=False, root_path=root_path
    )
    return httpx.AsyncClient(transport=transport, base_url="http://gem")


@pytest.fixture
def ask(application: Application, keys: Path) -> Ask:
    """Send a request to a door that wants a key."""

    def send(
        method: str, path: str, *, root_path: str = "", limits: Limits = LIMITS, **options: Any
    ) -> httpx.Response:
        async def run() -> httpx.Response:
            door = Door(application.api, limits, keys)
            async with client_of(door, root_path=root_path) as client:
                return await client.request(method, path, **options)

        return asyncio.run(run())

    return send


async def call(app: Any, send: Callable[..., Any], *, more_body: bool) -> None:
    """A request as a server brings it, whose client then goes; ``send`` gets what is answered."""
    messages = iter([{"type": "http.request", "body": b"{", "more_body": more_body}])

    async def receive() -> Any:
        return next(messages, {"type": "http.disconnect"})

    path = "/v1/embeddings"
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    await app(scope, receive, send)


async def body_that_does_not_end() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/ping", 200),
        ("HEAD", "/version", 200),
        ("OPTIONS", "/v1/embeddings", 200),
        ("POST", "/ping", 401),
        ("DELETE", "/health", 401),
        ("GET", "/v1/models", 401),
        ("GET", "//ping", 401),
    ],
)
def test_nobody_without_a_key_keeps_the_replica_waiting(
    method: str, path: str, status: int, ask: Ask, application: Application
) -> None:
    answer = ask(method, f"http://gem{path}", content=body_that_does_not_end())
    assert answer.status_code == status
    assert len(application.taken) == (status == 200)


def test_a_body_that_does_not_come_is_waited_for_no_longer_than_a_request_may_take(
    ask: Ask, key: dict[str, str]
) -> None:
    body = body_that_does_not_end()
    answer = ask("POST", "/v1/embeddings", limits=SHORT, content=body, headers=key)
    assert answer.status_code == 408
    assert answer.headers["connection"] == "close"
    assert "longer than 1 s" in answer.json()["error"]["message"]


def test_vllm_gets_the_path_below_the_route_prefix_and_the_body(
    ask: Ask,
    key: dict[str, str],
    application: Application,
    counted: Counter[tuple[str, str]],
) -> None:
    for prefix in ("", "/gem"):
        path = f"{prefix}/v1/embeddings?a=%20b"
        answer = ask("POST", path, root_path=prefix, headers=key, json={"input": "a"})
        assert answer.status_code == 200
    assert application.taken == [("/v1/embeddings", "a=%20b", b'{"input":"a"}')] * 2
    assert counted == {("embed", "200"): 2}


def test_a_page_in_a_browser_sees_why_it_is_refused(keys: Path, application: Application) -> None:
    async def ask(**headers: str) -> httpx.Response:
        cors = {"allow_origins": ["http://page"], "allow_credentials": True}
        async with client_of(Door(application.api, LIMITS, keys, cors)) as client:
            return await client.post("/v1/embeddings", headers=headers)

    refused = asyncio.run(ask(origin="http://page"))
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://page"
    assert "access-control-allow-origin" not in asyncio.run(ask(origin="http://other")).headers
    assert asyncio.run(ask()).json() == refused.json()


def test_what_breaks_is_counted_as_the_client_sees_it(
    ask: Ask, key: dict[str, str], application: Application, counted: Counter[tuple[str, str]]
) -> None:
    application.error = ValueError("no")
    assert ask("POST", "/v1/embeddings", headers=key, json={}).status_code == 500
    assert counted == {("embed", "500"): 1}


def test_a_client_that_goes_before_its_request_is_whole_is_counted_as_gone(
    application: Application, counted: Counter[tuple[str, str]]
) -> None:
    async def send(message: Any) -> None:
        pytest.fail(f"nobody is there for {message}")

    door = metrics.CountRequests(Door(application.api, LIMITS, None))
    asyncio.run(call(door, send, more_body=True))
    assert application.taken == []
    assert counted == {("embed", "499"): 1}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": ["a"] * 17}, 400, "has 17 inputs; at most 16"),
        ({"input": "a" * 1000}, 413, "larger than 1000 bytes"),
    ],
)
def test_a_request_may_only_be_so_large(
    body: dict[str, Any],
    status: int,
    message: str,
    ask: Ask,
    key: dict[str, str],
    application: Application,
) -> None:
    answer = ask("POST", "/v1/embeddings", headers=key, json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert application.taken == []


async def slow_stream() -> AsyncIterator[bytes]:
    yield b"data: {}\n\n"
    await asyncio.Event().wait()


def test_a_stream_that_takes_too_long_ends_with_an_error_event(
    ask: Ask, key: dict[str, str], application: Application, counted: Counter[tuple[str, str]]
) -> None:
    application.answer = lambda: StreamingResponse(slow_stream(), media_type="text/event-stream")
    answer = ask("POST", "/v1/completions", limits=SHORT, headers=key, json={"stream": True})
    assert answer.status_code == 200
    first, error, done = (line for line in answer.text.splitlines() if line)
    assert first == "data: {}"
    assert "longer than 1 s" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    assert counted == {("generate", "504"): 1}


def test_an_answer_that_takes_too_long_is_504(ask: Ask, key: dict[str, str]) -> None:
    async def wait(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.Event().wait()

    async def run() -> httpx.Response:
        async with client_of(Door(wait, SHORT, None)) as client:
            return await client.post("/v1/embeddings", json={})

    answer = asyncio.run(run())
    assert answer.status_code == 504
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_an_answer_that_is_whole_when_its_time_is_over_counts_as_one(
    kind: str, counted: Counter[tuple[str, str]]
) -> None:
    async def answer_and_wait(scope: Any, receive: Any, send: Any) -> None:
        await Response(b"all", media_type=kind)(scope, receive, send)
        await asyncio.Event().wait()

    async def run() -> httpx.Response:
        async with client_of(Door(answer_and_wait, SHORT, None)) as client:
            return await client.post("/v1/embeddings", json={})

    answer = asyncio.run(run())
    assert (answer.status_code, answer.content) == (200, b"all")
    assert counted == {("embed", "200"): 1}


def test_an_answer_whose_end_could_not_be_sent_is_not_whole(
    counted: Counter[tuple[str, str]],
) -> None:
    """As where the client reads no more: it sees that the answer breaks off."""

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    door = metrics.CountRequests(Door(JSONResponse({}), SHORT, None))
    with pytest.raises(Refused, match="longer than 1 s"):
        asyncio.run(call(door, send, more_body=False))
    assert counted == {("embed", "500"): 1}


@pytest.mark.parametrize("ends", ["time", "client"])
def test_vllm_is_told_of_an_end_whoever_makes_it(
    ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it sends after that is nobody's."""
    monkeypatch.setattr(door_module, "ABORT_GRACE_S", 60)  # it ends as soon as it has heard
    heard: list[str] = []

    async def listen(scope: Any, receive: Any, send: Any) -> None:
        while not heard or heard[-1] != "http.disconnect":
            heard.append((await receive())["type"])
        await JSONResponse({"late": True})(scope, receive, send)

    async def run() -> int | None:
        async with client_of(Door(listen, SHORT if ends == "time" else LIMITS, None)) as client:
            request = asyncio.create_task(client.post("/v1/embeddings", json={}))
            while not heard:
                await asyncio.sleep(0)
            if ends == "client":
                request.cancel()
                await asyncio.wait([request])
                return None
            return (await request).status_code

    assert asyncio.run(run()) == (504 if ends == "time" else None)
    assert heard == ["http.request", "http.disconnect"]


def test_only_so_many_are_worked_on_and_wait(
    counted: Counter[tuple[str, str]],
    gauges: dict[str, list[float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_seconds", 2.1)
    working = most = 0
    go_on = asyncio.Event()

    async def work(scope: Any, receive: Any, send: Any) -> None:
        nonlocal working, most
        working += 1
        most = max(most, working)
        await go_on.wait()
        working -= 1
        await JSONResponse({})(scope, receive, send)

    async def run() -> list[int]:
        door = Door(work, LIMITS, None)
        async with client_of(door) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json={})) for _ in range(8)]
            places = LIMITS.max_ongoing_requests + LIMITS.max_queued_requests
            for answer in islice(asyncio.as_completed(tasks), len(tasks) - places):
                refused = await answer
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "3"
                assert refused.json()["error"]["type"] == "rate_limit_error"
            go_on.set()
            return [(await task).status_code for task in tasks]

    statuses = asyncio.run(run())
    assert sorted(statuses) == [200] * 5 + [429] * 3
    assert most == LIMITS.max_ongoing_requests
    assert counted["generate", "429"] == 3
    assert max(gauges["gem_requests_waiting"]) == LIMITS.max_queued_requests
    assert max(gauges["gem_requests_in_progress generate"]) >= statuses.count(200)


def test_only_what_was_computed_tells_when_to_come_back(
    ask: Ask, key: dict[str, str], application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[float] = []
    monkeypatch.setattr(metrics, "_note_seconds", noted.append)
    assert ask("GET", "/ping").status_code == 200
    assert ask("POST", "/tokenize", headers=key, json={}).status_code == 200
    assert ask("POST", "/v1/embeddings", json={}).status_code == 401
    application.error = ValueError("no")
    assert ask("POST", "/v1/embeddings", headers=key, json={}).status_code == 500
    assert noted == []
    application.error = None
    for route in ("/v1/embeddings", "/v1/completions"):
        assert ask("POST", route, headers=key, json={}).status_code == 200
    assert len(noted) == 2


def test_where_the_queue_is_full_a_body_is_not_waited_for() -> None:
    async def run() -> int:
        limits = replace(LIMITS, max_ongoing_requests=1)
        door = Door(lambda *_: asyncio.Event().wait(), limits, None)
        async with client_of(door) as client:
            tasks = [asyncio.create_task(client.post("/v1/completions", json={})) for _ in range(4)]
            while door._waiting < limits.max_queued_requests:
                await asyncio.sleep(0.001)
            request = client.post("/v1/completions", content=body_that_does_not_end())
            answer = await asyncio.wait_for(request, 10)
            for task in tasks:
                task.cancel()
            return answer.status_code

    assert asyncio.run(run()) == 429


def test_metrics_are_gathered_once_for_all_who_ask_at_a_time(
    application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []

    async def gather() -> str:
        gathered.append(1)
        await asyncio.sleep(0.01)
        return "ray_gem_requests_total 1\n"

    async def run() -> list[str]:
        async with client_of(Door(application.api, LIMITS, None)) as client:
            pages = await asyncio.gather(*(client.get("/metrics") for _ in range(5)))
        return [page.text for page in pages]

    monkeypatch.setattr(metrics, "_of_cluster", gather)
    assert asyncio.run(run()) == ["ray_gem_requests_total 1\n"] * 5
    assert len(gathered) == 1


def test_one_that_leaves_the_queue_makes_room(application: Application) -> None:
    async def run() -> int:
        started = asyncio.Event()

        async def work(scope: Any, receive: Any, send: Any) -> None:
            started.set()
            await asyncio.Event().wait()

        limits = replace(LIMITS, request_timeout_s=1, max_ongoing_requests=1, max_queued_requests=1)
        door = Door(work, limits, None)
        async with client_of(door) as client:
            first = asyncio.create_task(client.post("/v1/completions", json={}))
            await started.wait()
            waits = asyncio.create_task(client.post("/v1/completions", json={}))
            while not door._waiting:
                await asyncio.sleep(0.001)
            waits.cancel()
            await asyncio.wait([waits])
            assert not door._waiting
            status = (await client.post("/v1/completions", json={})).status_code
            await first
            return status

    # Not 429: it waited, and for too long.
    assert asyncio.run(run()) == 504


def test_a_door_that_is_closed_lets_nobody_in(
    application: Application, counted: Counter[tuple[str, str]]
) -> None:
    async def run() -> list[httpx.Response]:
        door = Door(application.api, LIMITS, None)
        door.drain()
        async with client_of(door) as client:
            return [
                await client.post("/v1/embeddings", json={"input": "a"}),
                await client.get("/health"),
            ]

    for answer in asyncio.run(run()):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert "shutting down" in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "server_error"
    assert application.taken == []


def test_a_websocket_is_closed(application: Application) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        door = Door(application.api, LIMITS, None)
        await door({"type": "websocket", "path": "/v1/realtime"}, lambda: None, send)  # type: ignore[arg-type]

    asyncio.run(run())
    assert [message["type"] for message in sent] == ["websocket.close"]
