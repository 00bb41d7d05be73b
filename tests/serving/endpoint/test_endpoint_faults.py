"""`gem-vllm serve` under load: lost replicas, an update, too many requests, clients that leave."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import openai
import pytest
import ray
import yaml
from ray import serve

from gem_vllm.machine import free_ports
from gem_vllm.serving.endpoint.options import APP_NAME, EndpointOptions
from gem_vllm.serving.ray_settings import own_ray_settings
from tests.processes import alive, wait_until
from tests.serving.endpoint.conftest import ENGINE, LONG, Endpoint, running_endpoint, title

pytestmark = pytest.mark.slow

WORKING, QUEUED = 8, 2


@contextmanager
def load(client: Callable[[], openai.OpenAI], threads: int = 6) -> Iterator[list[Any]]:
    """Embeddings and chats by the official client, with its own retries, until the block ends.

    Yields a list to which every answer is added: its seconds, or the error that the client raised.
    """
    results: list[Any] = []
    stop = threading.Event()
    numbers = itertools.count()

    def work(own: openai.OpenAI) -> None:
        while not stop.is_set():
            n, start = next(numbers), time.monotonic()
            try:
                if n % 2:
                    own.embeddings.create(model="gem", input=f"text {n} about a river")
                else:
                    own.chat.completions.create(
                        model="gem",
                        messages=[{"role": "user", "content": f"Question {n}?"}],
                        max_tokens=30,
                    )
                results.append(time.monotonic() - start)
            except openai.OpenAIError as error:
                results.append(error)

    workers = [threading.Thread(target=work, args=(client(),)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield results
    finally:
        stop.set()
        for worker in workers:
            worker.join()


def failures(results: list[Any]) -> list[Any]:
    return [result for result in results if isinstance(result, Exception)]


@pytest.fixture(scope="module")
def endpoint(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    options = {
        "min-replicas": 2,
        "max-ongoing-requests": WORKING,
        "max-queued-requests": QUEUED,
    }
    flat = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    log = tmp_path_factory.mktemp("endpoint") / "log"
    with running_endpoint(model, log, *flat) as endpoint:
        yield endpoint


def replicas_alive(endpoint: Endpoint) -> int:
    """As the command has last reported it."""
    told = re.findall(r"(\d+) GemServer", endpoint.log.read_text())
    return int(told[-1]) if told else 0


@pytest.mark.parametrize("killed", ["engine", "replica"])
def test_a_replica_is_lost_and_no_client_sees_it(killed: str, endpoint: Endpoint) -> None:
    wait_until(lambda: replicas_alive(endpoint) == 2, "both replicas run", 120)
    with load(endpoint.openai) as results:
        wait_until(lambda: len(results) > 30, "the load is on")
        replica = endpoint.replicas()[0]
        below = replica.children(recursive=True)
        victim = replica
        if killed == "engine":
            victim = next(process for process in below if "EngineCore" in title(process))
        victim.kill()
        served = len(results)
        wait_until(lambda: len(results) > served + 60, "the other replica answers")
        wait_until(lambda: replica.pid not in {r.pid for r in endpoint.replicas()}, "it is gone")
        wait_until(lambda: len(endpoint.replicas()) == 2, "a new one starts")
        wait_until(lambda: replicas_alive(endpoint) == 2, "it runs", 120)
    assert not failures(results), failures(results)[:3]
    wait_until(
        lambda: not any(alive(each.pid) for each in (replica, *below)),
        "what the lost replica had started is gone too",
    )


def test_five_times_too_much_does_not_slow_what_is_taken(endpoint: Endpoint) -> None:
    wait_until(lambda: replicas_alive(endpoint) == 2, "both replicas run", 120)

    async def clients(count: int, seconds: float) -> tuple[list[float], list[float]]:
        """Seconds of answers with 200, and of those with 429, of so many clients in a loop."""
        taken: list[float] = []
        refused: list[float] = []
        # Not httpx, which itself takes seconds for a request among a hundred.
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(endpoint.url, connector=connector) as client:
            end = time.monotonic() + seconds

            async def one(n: int) -> None:
                while (start := time.monotonic()) < end:
                    body = {"model": "gem", "prompt": f"{n}", "max_tokens": 200, "ignore_eos": True}
                    async with client.post("/v1/completions", json=body) as answer:
                        await answer.read()
                    times = {200: taken, 429: refused}[answer.status]
                    times.append(time.monotonic() - start)
                    if answer.status == 429:
                        await asyncio.sleep(float(answer.headers["retry-after"]))

            await asyncio.gather(*(one(n) for n in range(count)))
        return taken, refused

    # As many as are worked on and may wait: without a refusal, it could be no fuller.
    full = 2 * (WORKING + QUEUED)
    when_full, _ = asyncio.run(clients(full, 20))
    taken, refused = asyncio.run(clients(5 * full, 20))
    assert len(refused) > 2 * full
    # On two cores, a hundred clients and what refuses them take a part of the engines' time.
    assert np.median(taken) < 2 * np.median(when_full)
    assert np.percentile(taken, 95) < 2 * np.percentile(when_full, 95)
    assert np.median(refused) < np.median(taken) / 4


def test_a_thousand_clients_that_leave_take_their_requests_along(endpoint: Endpoint) -> None:
    wait_until(lambda: replicas_alive(endpoint) == 2, "both replicas run", 120)
    at_once = 2 * WORKING

    async def leave() -> None:
        turns = asyncio.Semaphore(at_once)
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=0)

        async def one(client: httpx.AsyncClient, n: int) -> None:
            body = {"prompt": f"{n}", "max_tokens": LONG, "ignore_eos": True, "stream": True}
            status = 0
            while status != 200:
                async with (
                    turns,
                    client.stream("POST", "/v1/completions", json={"model": "gem", **body}) as r,
                ):
                    status = r.status_code
                    assert status in (200, 429)
                    await anext(aiter(r.aiter_lines()))

        async with httpx.AsyncClient(base_url=endpoint.url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(one(client, n) for n in range(1000)))

    asyncio.run(leave())
    steps = [endpoint.metric("ray_gem_steps_total"), -1.0]
    deadline = time.monotonic() + 30
    while steps[-1] != steps[-2]:
        assert time.monotonic() < deadline, f"the engines go on: {steps}"
        time.sleep(1.5)
        steps.append(endpoint.metric("ray_gem_steps_total"))
    # Whoever had left something behind would have no room for these.
    with load(endpoint.openai, threads=at_once) as results:
        wait_until(lambda: len(results) > 4 * at_once, "the replicas answer")
    assert not failures(results)


def test_an_engine_that_cannot_start_ends_the_command_with_its_reason(model: Path) -> None:
    engine = json.dumps({**ENGINE, "additional_config": {"gem_tokens_beside_chat": 0}})
    port = str(*free_ports(1))
    command = [sys.executable, "-m", "gem_vllm.cli", "serve", str(model), "--port", port]
    done = subprocess.run(
        [*command, "--engine", engine], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.startswith("error: the endpoint could not be brought up: gem_tokens_beside_chat")


def test_more_load_starts_another_replica(model: Path, tmp_path: Path) -> None:
    options = ("--max-replicas", "2", "--target-ongoing-requests", "2")
    with running_endpoint(model, tmp_path / "log", *options) as endpoint:
        wait_until(lambda: replicas_alive(endpoint) == 1, "there is one")
        with load(endpoint.openai, threads=12) as results:
            wait_until(lambda: replicas_alive(endpoint) == 2, "there are two", 240)
        assert not failures(results)


@pytest.mark.parametrize(("proxy", "replicas"), [("haproxy", 2), ("haproxy", 1), ("ray's own", 2)])
def test_an_update_to_another_checkpoint_is_seen_by_no_client(
    proxy: str, replicas: int, model: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """By Ray's own `serve deploy`, with the file that --print-config gives.

    Where there is one replica, requests wait for the new one.
    """
    other = tiny_checkpoint("llama", k=3, max_position_embeddings=16384, seed=7)
    host, (port,) = "127.0.0.1", free_ports(1)

    def deploy(checkpoint: Path) -> None:
        options = EndpointOptions(
            checkpoint,
            served_model_name="gem",
            min_replicas=replicas,
            max_replicas=replicas,
            engine=ENGINE,
        )
        file = tmp_path / "serve.yaml"
        file.write_text(yaml.safe_dump(options.serve_config(host, port)))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(file)]
        subprocess.run(
            [*command, "--address", f"http://{dashboard}"], check=True, stdout=subprocess.DEVNULL
        )

    def root() -> str:
        # Of one replica, until the next has started: as long as is waited for that.
        answer = httpx.get(f"http://{host}:{port}/v1/models", timeout=240)
        return answer.json()["data"][0]["root"] if answer.status_code == 200 else ""

    def settled(checkpoint: Path) -> bool:
        application = serve.status().applications[APP_NAME]
        return application.status.value == "RUNNING" and root() == str(checkpoint)

    def embedding() -> int:
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none")
        return len(client.embeddings.create(model="gem", input="a").data[0].embedding)

    with ExitStack() as stack:
        if proxy == "haproxy":
            stack.enter_context(own_ray_settings())
        dashboard = ray.init(
            address="local", num_cpus=2, include_dashboard=True, log_to_driver=False
        ).dashboard_url
        stack.callback(ray.shutdown)
        stack.callback(serve.shutdown)
        deploy(model)
        wait_until(
            lambda: APP_NAME in serve.status().applications and settled(model), "it is up", 240
        )
        with load(
            lambda: openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none")
        ) as results:
            wait_until(lambda: len(results) > 20, "the load is on")
            deploy(other)
            wait_until(lambda: root() == str(other), "the new one answers", 240)
            wait_until(
                lambda: settled(other) and all(root() == str(other) for _ in range(10)),
                "the old one is gone",
                240,
            )
            served = len(results)
            wait_until(lambda: len(results) > served + 20, "the new one goes on")
        assert not failures(results), failures(results)[:3]
        assert embedding() == 64
