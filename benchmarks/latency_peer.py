"""An engine of `latency.py`, in a process of its own: `engine` is the near end, `serve` the far."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gem_vllm.errors import GemError
from gem_vllm.machine import serve_dtype

CHATS, ANSWER, WAITING = 8, 48, 64
ENGINE_OPTIONS: dict[str, Any] = {
    "max_model_len": 2304,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 1 << 30,
    "distributed_executor_backend": "uni",
}


@contextmanager
def engine(folder: Path, environment: Mapping[str, str]) -> Iterator[Connection]:
    """An engine in a process of its own, which idles without using a core."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, folder, environment))
    process.start()
    theirs.close()
    try:
        request(ours, "ready")
        yield ours
    finally:
        ours.close()
        process.join(timeout=60)
        process.kill()


def request(peer: Connection, name: str, **arguments: Any) -> Any:
    """Have a peer do something, and what came out; GemError where its engine has ended."""
    try:
        peer.send((name, arguments))
        return peer.recv()
    except (EOFError, BrokenPipeError) as error:
        raise GemError(f"an engine ended ({name}); its message is above") from error


def serve(peer: Connection, folder: Path, environment: Mapping[str, str]) -> None:
    """The process of an engine; ``environment``: beside this one's."""
    os.environ.update(environment)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM

    llm = LLM(str(folder), dtype=serve_dtype(), **ENGINE_OPTIONS)
    work = {"ready": ready, "embed": embed, "first_token": first_token, "beside": beside_texts}
    while True:
        try:
            name, arguments = peer.recv()
        except EOFError:
            return
        peer.send(work[name](llm, **arguments))


def ready(llm: Any) -> None:
    """Answer, when it has started."""


def embed(llm: Any, ids: list[int]) -> None:
    """Embed one text."""
    llm.embed({"prompt_token_ids": ids}, use_tqdm=False)


def first_token(llm: Any, ids: list[int]) -> float:
    """Seconds from a prompt to its first token."""
    from vllm import SamplingParams

    started = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1)
    llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    return time.perf_counter() - started


def bound_texts(scheduler: Any, cap: int | None) -> None:
    """Have a scheduler go on as one that was made with a ``gem_tokens_beside_chat`` of ``cap``."""
    scheduler._tokens_beside_chat = cap
    # Without a cap nothing sets this, which still has the room of the cap before.
    scheduler.max_num_scheduled_tokens = scheduler._tokens_of_a_step


def beside_texts(
    llm: Any,
    prompts: list[list[int]],
    texts: list[list[int]],
    cap: int | None,
    with_texts: bool,
    waves: int,
) -> dict[str, Any]:
    """Answer chats, a wave of eight at a time, while texts wait to be embedded.

    Returns:
        ``per_token``: of each chat, mean seconds from one token to the next; ``gaps``: all of
        those; ``embedded``: tokens of texts per second, while all chats of a wave are being
        answered.
    """
    from vllm import PoolingParams, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    core = llm.llm_engine
    bound_texts(core.engine_core.engine_core.scheduler, cap)
    if not llm.reset_prefix_cache():
        raise RuntimeError("requests of the setting before still hold KV blocks")
    greedy = SamplingParams(
        temperature=0.0,
        max_tokens=ANSWER,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    lengths: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    sent = embedded = 0
    seconds = 0.0
    for wave in range(waves):
        for n in range(CHATS):
            name = f"chat-{wave}-{n}"
            prompt = prompts[(wave * CHATS + n) % len(prompts)]
            core.add_request(name, {"prompt_token_ids": prompt}, greedy.clone())
            times[name] = []
        answering, begun, since = CHATS, 0, 0.0
        while answering:
            while with_texts and len(lengths) < WAITING:
                # A first token of its own: the prefix cache must not have it.
                text = [3 + sent % 997, *texts[sent % len(texts)]]
                core.add_request(
                    f"text-{sent}", {"prompt_token_ids": text}, PoolingParams(task="embed")
                )
                lengths[f"text-{sent}"] = len(text)
                sent += 1
            for output in core.step():
                if output.request_id in lengths:
                    length = lengths.pop(output.request_id)
                    embedded += length if begun == CHATS else 0
                elif output.request_id in times:
                    now = time.perf_counter()
                    begun += not times[output.request_id]
                    since = since if begun < CHATS or since else now
                    times[output.request_id].append(now)
                    answering -= output.finished
        seconds += time.perf_counter() - since
    core.abort_request([*lengths])
    while core.has_unfinished_requests():
        core.step()
    gaps = [np.diff(row) for row in times.values()]
    return {
        "per_token": [round(float(row.mean()), 6) for row in gaps],
        "gaps": [round(float(gap), 6) for row in gaps for gap in row],
        "embedded": embedded / seconds,
    }
