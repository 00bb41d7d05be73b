"""One peer of `engine.py`, a process of its own: `Peer` is the near end, `main` the far one.

They talk over a Unix socket, one JSON object a line, and each is answered with one. The first says
what to load; every later one is a load: how many texts to embed, how many completions to generate,
and how many of each may be in flight. The answer is the seconds from the first request to the last
result.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
from benchmark_script import PLAIN_VLLM

from gem_vllm.errors import GemError
from gem_vllm.machine import serve_environment
from gem_vllm.processes import process_group

LOAD_SECONDS = 900.0
LOG_TAIL_LINES = 12
TRANSFORMERS_BATCH = 32


class Peer:
    """A running peer, as `engine.py` sees it."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self._process, self._log = name, process, log

    @classmethod
    @contextlib.contextmanager
    def started(cls, name: str, setup: dict[str, Any], folder: Path) -> Iterator[Peer]:
        """Start a process and send it ``setup``; `receive` waits until that is loaded.

        Args:
            name: for messages.
            setup: ``kind`` ("gem", "pooling", "generating" or "transformers"), ``model``,
                ``cores``, ``dtype``, ``options`` of vLLM's engine, ``max_tokens``, and the token
                ids of ``texts`` (by length) and ``prompts``.
            folder: for the socket and the log.
        """
        path, log = folder / f"{name}.socket", folder / f"{name}.log"
        env = serve_environment()
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, setup["cores"]))
        env.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        if setup["kind"] == "transformers":
            env.pop("LD_PRELOAD", None)
        if setup["kind"] != "gem":
            env |= PLAIN_VLLM
        command = [sys.executable, Path(__file__).resolve(), path]
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            server.listen(1)
            server.settimeout(0.5)
            with process_group(command, env=env, log=log) as process:
                peer = cls(name, process, log)
                with peer._accept(server) as connection:
                    connection.settimeout(LOAD_SECONDS)
                    with connection.makefile("rw") as peer._lines:
                        peer.send(setup)
                        yield peer

    def send(self, message: dict[str, Any]) -> None:
        """Hand over a setup or a load."""
        with self._failing_clearly():
            print(json.dumps(message), file=self._lines, flush=True)

    def receive(self) -> dict[str, Any]:
        """The answer to what was sent; GemError with the end of the log if there is none."""
        with self._failing_clearly():
            line = self._lines.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def resident(self) -> int:
        """Bytes in memory of all its processes; pages that several share count in parts."""
        root = psutil.Process(self._process.pid)
        return sum(p.memory_full_info().pss for p in [root, *root.children(recursive=True)])

    def _accept(self, server: socket.socket) -> socket.socket:
        while self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                return server.accept()[0]
        raise self._failure()

    @contextlib.contextmanager
    def _failing_clearly(self) -> Iterator[None]:
        try:
            yield
        except (TimeoutError, ConnectionError) as error:
            raise self._failure() from error

    def _failure(self) -> GemError:
        tail = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return GemError(
            "\n  ".join([f"the peer '{self.name}' failed; its log ends:", *tail[-LOG_TAIL_LINES:]])
        )


def main() -> None:
    """Load what the first line says, then run one load after the other until the socket closes."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        with connection.makefile("rw") as lines:
            setup = json.loads(lines.readline())
            # All threads and processes of the peer, before torch starts the first.
            os.sched_setaffinity(0, setup["cores"])
            run = transformers_peer(setup) if setup["kind"] == "transformers" else vllm_peer(setup)
            answer: dict[str, Any] = {"ready": True}
            while True:
                print(json.dumps(answer), file=lines, flush=True)
                if not (line := lines.readline()):
                    return
                answer = {"seconds": run(json.loads(line))}


def vllm_peer(setup: dict[str, Any]) -> Callable[[dict[str, Any]], float]:
    """A vLLM engine, as its kind says; the result runs a load and gives its seconds."""
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    runner = {"runner": "pooling", "convert": "embed"} if setup["kind"] == "pooling" else {}
    engine = LLM(setup["model"], dtype=setup["dtype"], **setup["options"], **runner).llm_engine
    embed = PoolingParams(task="embed")
    generate = SamplingParams(
        temperature=0.0,
        max_tokens=setup["max_tokens"],
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    def run(load: dict[str, Any]) -> float:
        requests = {
            "generate": take(setup["prompts"], load["generate"]),
            "embed": take(setup["texts"][load["texts"]], load["embed"]),
        }
        params = {"generate": generate, "embed": embed}
        in_flight = dict.fromkeys(requests, 0)
        added = 0
        start = time.perf_counter()
        while True:
            for kind, waiting in requests.items():
                for ids in islice(waiting, load[f"{kind}_in_flight"] - in_flight[kind]):
                    prompt = {"prompt_token_ids": ids}
                    engine.add_request(f"{kind} {added}", prompt, params[kind].clone())
                    in_flight[kind] += 1
                    added += 1
            if not any(in_flight.values()):
                return time.perf_counter() - start
            for output in engine.step():
                in_flight[output.request_id.split()[0]] -= 1

    return run


def transformers_peer(setup: dict[str, Any]) -> Callable[[dict[str, Any]], float]:
    """Mean-pooled embeddings by transformers: sorted by length, in batches, with padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setup["model"], padding_side="right")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(setup["model"], dtype=setup["dtype"]).to(device)

    @torch.inference_mode()
    def run(load: dict[str, Any]) -> float:
        ids = take(setup["texts"][load["texts"]], load["embed"])
        texts = tokenizer.batch_decode(list(ids))
        start = time.perf_counter()
        texts = sorted(texts, key=len)
        for first in range(0, len(texts), TRANSFORMERS_BATCH):
            batch = tokenizer(
                texts[first : first + TRANSFORMERS_BATCH],
                padding=True,
                return_tensors="pt",
            ).to(device)
            states = model(**batch, use_cache=False).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
            torch.nn.functional.normalize(mean, dim=-1).cpu()
        return time.perf_counter() - start

    return run


def take(rows: list[list[int]], count: int) -> Iterator[list[int]]:
    """The first ``count`` rows, from the start again where there are fewer."""
    return islice(cycle(rows), count)


if __name__ == "__main__":
    main()
