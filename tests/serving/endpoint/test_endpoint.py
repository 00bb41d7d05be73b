"""`gem-vllm serve` with two replicas of a tiny model: routes, keys, limits, queue, draining."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.serving.endpoint.keys import new_key
from gem_vllm.tokens import load_tokenizer
from tests.processes import alive, wait_until
from tests.serving.endpoint.conftest import LONG, Endpoint, running_endpoint
from tests.serving.processes import standing_still

# Of each replica.
WORKING, QUEUED = 6, 6
CAPACITY = 2 * (WORKING + QUEUED)
TIMEOUT = 20.0
MAX_INPUTS = 16
PAGE = "http://page.example"
TEXTS = ["A library keeps books and maps.", "Bread is made from flour.", "1969"]
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry collector that keeps what it is sent."""

    def __init__(self) -> None:
        received: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Nothing."""

        super().__init__(("127.0.0.1", 0), Handler)
        self.received = received
        threading.Thread(target=self.serve_forever, daemon=True).start()


def long_completion(n: int, **fields: Any) -> dict[str, Any]:
    """A body that is not answered in the time that a request may take here."""
    return {"model": "gem", "prompt": str(n), "max_tokens": LONG, "ignore_eos": True, **fields}


def begin(client: httpx.AsyncClient, count: int) -> list[asyncio.Task[httpx.Response]]:
    """Requests, none of which is answered."""
    return [
        asyncio.create_task(client.post("/v1/completions", json=long_completion(n)))
        for n in range(count)
    ]


async def take_back(tasks: list[asyncio.Task[httpx.Response]]) -> None:
    """Close the connections of those that are not answered."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        collector.shutdown()


@pytest.fixture(scope="module")
def endpoint(
    model: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    folder = tmp_path_factory.mktemp("endpoint")
    key = new_key(folder / "keys", "tests")
    options = {
        "min-replicas": 2,
        "max-ongoing-requests": WORKING,
        "max-queued-requests": QUEUED,
        "request-timeout": TIMEOUT,
        "max-inputs": MAX_INPUTS,
        "max-body-mb": 6,
        "api-keys": folder / "keys",
    }
    flat = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    traces = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    with running_endpoint(
        model,
        folder / "log",
        *flat,
        key=key,
        engine={"otlp_traces_endpoint": traces, "allowed_origins": [PAGE]},
        environment={
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_SCHEDULE_DELAY": "500",
        },
    ) as endpoint:
        yield endpoint


def test_embeddings_are_the_references(endpoint: Endpoint, model: Path) -> None:
    answer = endpoint.post("/v1/embeddings", input=TEXTS)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    have = torch.tensor([entry["embedding"] for entry in answer.json()["data"]])
    tokenizer = load_tokenizer(model)
    expected = ReferenceEmbedder(model).embed([tokenizer(text)["input_ids"] for text in TEXTS])
    cosines = torch.nn.functional.cosine_similarity(have.double(), expected.double())
    assert cosines.min() >= 0.9999
    assert answer.json()["usage"]["prompt_tokens"] == sum(
        len(tokenizer(text)["input_ids"]) for text in TEXTS
    )


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT, "max_tokens": 3}),
        ("/v1/completions", {"prompt": "The river", "max_tokens": 3}),
        ("/v1/responses", {"input": "Hello", "max_output_tokens": 16}),
        ("/v2/embed", {"texts": TEXTS, "embedding_types": ["float"]}),
        ("/pooling", {"input": TEXTS, "task": "embed"}),
        ("/score", {"text_1": TEXTS[0], "text_2": TEXTS[1:]}),
        ("/rerank", {"query": TEXTS[0], "documents": TEXTS[1:]}),
        ("/tokenize", {"prompt": "The river"}),
    ],
)
def test_a_replica_answers_on_every_route_of_vllm(
    route: str, body: dict[str, Any], endpoint: Endpoint
) -> None:
    answer = endpoint.post(route, **body)
    assert answer.status_code == 200, answer.text


def test_what_is_wrong_is_said_as_vllm_says_it(endpoint: Endpoint) -> None:
    assert "does not exist" in endpoint.post("/v1/embeddings", model="no", input="a").text
    for answer, status, message in (
        (endpoint.post("/v1/embeddings", input=""), 400, "at least one character"),
        (endpoint.post("/v1/embeddings", input="a <|gem_0|>"), 400, "reserved GEM token"),
        (endpoint.post("/v1/completions", prompt="a", max_tokens=-1), 400, "max_tokens"),
        (endpoint.post("/v1/nothing"), 404, "Not Found"),
    ):
        assert answer.status_code == status, answer.text
        assert message in answer.text
    with endpoint.http() as client:
        answer = client.post(
            "/v1/embeddings", content=b"{torn", headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["gem"]


def test_the_openai_client_embeds_chats_and_streams_at_once(endpoint: Endpoint) -> None:
    client = endpoint.openai(max_retries=0)

    def stream() -> str:
        chunks = client.chat.completions.create(
            model="gem", messages=CHAT, max_tokens=40, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def chat() -> str:
        answer = client.chat.completions.create(
            model="gem", messages=CHAT, max_tokens=40, temperature=0
        )
        return answer.choices[0].message.content

    def embed() -> int:
        return len(client.embeddings.create(model="gem", input=TEXTS[0]).data[0].embedding)

    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(task) for task in (stream, chat, embed) * 3]
        streams, chats, sizes = (
            {future.result() for future in futures[kind::3]} for kind in range(3)
        )
    assert sizes == {64}
    assert streams == chats
    assert len(streams) == 1


def test_every_route_that_computes_wants_a_key(endpoint: Endpoint) -> None:
    for headers in ({}, {"Authorization": "Bearer gem-no"}, {"Authorization": endpoint.key}):
        with httpx.Client(base_url=endpoint.url, headers=headers, timeout=120) as client:
            for route in ("/v1/embeddings", "/v1/chat/completions", "/tokenize", "/anything"):
                answer = client.post(route, json={"model": "gem", "input": "a"})
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="gem-no").models.list()


def test_a_page_in_a_browser_may_ask_and_sees_why_it_is_refused(endpoint: Endpoint) -> None:
    headers = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{endpoint.url}/v1/embeddings", headers=headers, timeout=120)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    url, headers = f"{endpoint.url}/v1/embeddings", {"Origin": PAGE}
    answer = httpx.post(url, headers=headers, json={}, timeout=120)
    assert answer.status_code == 401
    assert answer.headers["access-control-allow-origin"] == PAGE


def test_a_request_may_only_be_so_large(endpoint: Endpoint) -> None:
    answer = endpoint.post("/v1/embeddings", input=["a"] * (MAX_INPUTS + 1))
    assert answer.status_code == 400
    assert f"has {MAX_INPUTS + 1} inputs; at most {MAX_INPUTS}" in answer.json()["error"]["message"]
    assert endpoint.post("/v1/embeddings", input=["a"] * MAX_INPUTS).status_code == 200
    # More than gRPC takes in a message if nobody asks it to.
    assert endpoint.post("/v1/embeddings", input="a", user="u" * (5 << 20)).status_code == 200
    body = json.dumps({"model": "gem", "input": "a" * (6 << 20)}).encode()
    with endpoint.http() as client:
        for content in (body, iter([body[:1000], body[1000:]])):
            answer = client.post("/v1/embeddings", content=content)
            assert answer.status_code == 413
            assert "larger than 6291456 bytes" in answer.json()["error"]["message"]


def test_what_takes_too_long_is_ended(endpoint: Endpoint) -> None:
    """However fast the engines are: once the stream has begun, they stand still."""
    lines: list[str] = []

    def stream() -> httpx.Response:
        body = long_completion(0, stream=True)
        with (
            endpoint.http() as client,
            client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
            return answer

    before = endpoint.requests("generate", 504)
    engines = endpoint.engines()
    assert len(engines) == 2
    with ThreadPoolExecutor(2) as pool:
        asked = pool.submit(endpoint.post, "/v1/completions", **long_completion(0))
        began = pool.submit(stream)
        wait_until(lambda: lines or began.done(), "the stream begins")
        with standing_still(engines):
            whole, streamed = asked.result(), began.result()
    assert whole.status_code == 504
    assert int(whole.headers["retry-after"]) >= 1
    assert "took longer than 20 s" in whole.json()["error"]["message"]
    assert streamed.status_code == 200
    *tokens, error, done = lines
    assert 0 < len(tokens) < LONG
    assert "took longer than 20 s" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    wait_until(lambda: endpoint.requests("generate", 504) == before + 2, "they are in /metrics")


def test_embedding_a_text_and_asking_about_it_meet_in_one_cache(endpoint: Endpoint) -> None:
    """Ten texts; by chance alone, half of the questions would come to the other replica."""
    texts = [" ".join(f"{word}{i}" for word in ["river", "bread"] * 40) for i in range(10)]
    before = endpoint.metric("ray_vllm_prefix_cache_hits_total")
    for text in texts:
        assert endpoint.post("/v1/embeddings", input=text).status_code == 200
    tokens = 0
    for text in texts:
        answer = endpoint.post("/v1/completions", prompt=f"{text} Why?", max_tokens=1)
        tokens += answer.json()["usage"]["prompt_tokens"]
    wait_until(
        lambda: endpoint.metric("ray_vllm_prefix_cache_hits_total") - before > 0.8 * tokens,
        "the questions' texts are found in the prefix cache",
        30,
    )


def test_a_client_that_hangs_up_leaves_nothing_running(endpoint: Endpoint) -> None:
    def steps() -> float:
        return endpoint.metric("ray_gem_steps_total")

    async def begin_and_hang_up() -> None:
        async with endpoint.async_http() as client, AsyncExitStack() as streams:
            tasks = begin(client, WORKING // 2)
            for n in range(WORKING // 2):  # Behind those, which have no sign of having come.
                body = long_completion(n, stream=True)
                stream = client.stream("POST", "/v1/completions", json=body)
                answer = await streams.enter_async_context(stream)
                assert answer.status_code == 200
            await asyncio.to_thread(wait_until, all_at_work, "all of them have come")
            await take_back(tasks)

    def all_at_work() -> bool:
        return endpoint.metric("ray_gem_requests_in_progress", task="generate") >= WORKING

    gone, late = endpoint.requests("generate", 499), endpoint.requests("generate", 504)
    begun = steps()
    asyncio.run(begin_and_hang_up())
    wait_until(
        lambda: endpoint.requests("generate", 499) == gone + WORKING,
        "the doors know that they have gone",
    )
    counts = [steps(), -1.0]
    while counts[-1] != counts[-2]:
        time.sleep(1.5)
        counts.append(steps())
        # An engine takes a step at least for every token of an answer.
        assert counts[-1] < begun + LONG, f"the engines go on: {counts}"
    # What a request may take here has ended none of them.
    assert endpoint.requests("generate", 504) == late


def test_above_the_queue_the_answer_is_429_at_once(endpoint: Endpoint) -> None:
    """While what is let in is at work, for longer than a request may take here."""
    before = endpoint.requests("generate", 429)

    async def flood() -> list[httpx.Response]:
        async with endpoint.async_http(limits=httpx.Limits(max_connections=None)) as client:
            tasks = begin(client, 3 * CAPACITY)
            answers = [await each for each in islice(asyncio.as_completed(tasks), 2 * CAPACITY)]
            await take_back(tasks)
        return answers

    with standing_still(endpoint.engines()):
        answers = asyncio.run(flood())
    assert [answer.status_code for answer in answers] == [429] * (2 * CAPACITY)
    assert all(1 <= int(answer.headers["retry-after"]) <= 30 for answer in answers)
    wait_until(
        lambda: endpoint.post("/v1/completions", prompt="a", max_tokens=1).status_code == 200,
        "there is room again",
    )
    wait_until(
        lambda: endpoint.requests("generate", 429) >= before + 2 * CAPACITY, "they are in /metrics"
    )


def test_the_metrics_count_by_task(endpoint: Endpoint) -> None:
    text = CHAT[0]["content"] * 20
    body = {"model": "gem", "prompt": text, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with endpoint.http() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        # To the same replica, by their text, and into the steps of the answer.
        for _ in range(5):
            assert endpoint.post("/v1/embeddings", input=text).status_code == 200
        list(lines)

    def counted() -> bool:
        return all(
            (
                endpoint.requests("embed", 200) > 0,
                endpoint.requests("generate", 200) > 0,
                endpoint.metric("ray_gem_request_seconds_count", task="embed") > 0,
                endpoint.metric("ray_gem_queue_seconds_count", task="embed") > 0,
                endpoint.metric("ray_gem_latency_seconds_count", task="generate") > 0,
                endpoint.metric("ray_gem_prompt_tokens_total", task="embed") > 0,
                endpoint.metric("ray_gem_generation_tokens_total") > 0,
                endpoint.metric("ray_gem_steps_total", kind="mixed") > 0,
            )
        )

    wait_until(counted, "all that happened is in /metrics", 30)


def test_a_trace_goes_on_in_the_engine(endpoint: Endpoint, collector: Collector) -> None:
    trace = bytes(range(1, 17))
    with endpoint.http() as client:
        client.post(
            "/v1/completions",
            json={"model": "gem", "prompt": "a", "max_tokens": 2},
            headers={"traceparent": f"00-{trace.hex()}-{'1' * 16}-01"},
        )
    wait_until(lambda: any(trace in sent for sent in collector.received), "the span is exported")


def test_an_endpoint_that_is_to_stop_answers_what_it_has_taken(endpoint: Endpoint) -> None:
    """The last test of the module: it ends the endpoint."""
    everything = endpoint.process.children(recursive=True)
    statuses: list[int] = []

    def stream(n: int) -> str:
        body = {"model": "gem", "prompt": str(n), "max_tokens": 150, "ignore_eos": True}
        with (
            endpoint.http() as client,
            client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer,
        ):
            statuses.append(answer.status_code)
            return "".join(answer.iter_text())

    # As long as this one is open, the endpoint is, too.
    with (
        ThreadPoolExecutor(WORKING) as pool,
        endpoint.http() as client,
        client.stream("POST", "/v1/completions", json=long_completion(0, stream=True)) as last,
    ):
        assert last.status_code == 200
        streams = [pool.submit(stream, n) for n in range(WORKING)]
        wait_until(lambda: len(statuses) == WORKING, "the streams have begun")
        endpoint.process.send_signal(signal.SIGTERM)
        wait_until(
            lambda: endpoint.post("/v1/embeddings", input="a").status_code == 503,
            "new requests are refused",
        )
        refused = endpoint.post("/v1/embeddings", input="a")
        assert int(refused.headers["retry-after"]) >= 1
        with endpoint.http() as another:
            assert another.get("/health").status_code == 503
        for future in streams:
            text = future.result()
            assert text.rstrip().endswith("data: [DONE]")
            assert '"error"' not in text
    assert endpoint.process.wait(timeout=60) == 0
    assert endpoint.log.read_text().splitlines()[-1] == "stopped"
    assert "not all requests were answered" not in endpoint.log.read_text()
    wait_until(lambda: not any(alive(each.pid) for each in everything), "everything ends")
