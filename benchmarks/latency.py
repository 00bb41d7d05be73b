"""How long chat waits: behind a text that was just embedded, and beside many that are.

    python benchmarks/latency.py --checkpoint DIR --base DIR [--out benchmarks/results]

Two tables, of medians over rounds. **Ask**: 2,000 tokens are embedded, then a question is asked
about them, and its first token is waited for: with one GEM engine, whose prefix cache has them, and
with an engine of its own for chat, which has not. **Beside**: eight chats at a time are answered
while texts to embed are always waiting, for several values of ``gem_tokens_beside_chat``, and once
without texts. About ten minutes on two cores that have nothing else to do. Writes ``latency.json``,
``latency.md`` and ``latency.png``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmark_script import add_out, commit, hardware, run_script, shown_command
from engine_facts import PROMPTS, TEXTS, read_paragraphs, read_texts

from gem_vllm.folders import write_json
from gem_vllm.machine import serve_dtype

DOCUMENT, QUESTION, ROUNDS = 2000, 20, 8
CHATS, ANSWER, WAVES, WAITING = 8, 48, 3, 64
CAPS: tuple[int | None, ...] = (None, 1024, 512, 256, 128, 64)
ENGINE_OPTIONS: dict[str, Any] = {
    "max_model_len": 2304,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 1 << 30,
    "distributed_executor_backend": "uni",
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a GEM checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="the base it was made from")
    add_out(parser)
    args = parser.parse_args()
    documents, questions = read_documents(args.base)
    with engine(args.checkpoint) as gem, engine(args.base) as plain:
        asked = ask(gem, plain, documents, questions)
        texts = read_texts(args.base)
        load = {"prompts": texts["prompts"], "texts": texts["texts"]["embed 230"]}
        request(gem, "beside", **load, cap=None, with_texts=True, waves=1)  # to warm up
        beside = {
            "alone": request(gem, "beside", **load, cap=None, with_texts=False, waves=WAVES),
            **{
                str(cap): request(gem, "beside", **load, cap=cap, with_texts=True, waves=WAVES)
                for cap in CAPS
            },
        }
    result = {
        "ask": asked,
        "beside": beside,
        "command": shown_command(sys.argv),
        "hardware": hardware(),
        "dtype": serve_dtype(),
        "vllm": version("vllm"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    write_json(args.out / "latency.json", result)
    (args.out / "latency.md").write_text(markdown(result), encoding="utf-8")
    plot(beside, args.out / "latency.png")
    print(markdown(result))


def read_documents(base: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Documents of 2,000 tokens of Wikipedia, one for each round and one to warm up; questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [i for row in tokenizer(read_paragraphs(TEXTS))["input_ids"] for i in row]
    others = [i for row in tokenizer(read_paragraphs(PROMPTS))["input_ids"] for i in row]
    return (
        [ids[n * DOCUMENT : (n + 1) * DOCUMENT] for n in range(ROUNDS + 1)],
        [others[n * QUESTION : (n + 1) * QUESTION] for n in range(ROUNDS + 1)],
    )


def ask(gem: Connection, plain: Connection, documents: Any, questions: Any) -> dict[str, Any]:
    """Seconds to the first token, by round; the first round is left out."""
    seconds: dict[str, list[float]] = {"one engine": [], "two engines": []}
    for document, question in zip(documents, questions, strict=True):
        request(gem, "embed", ids=document)
        seconds["one engine"].append(request(gem, "first_token", ids=document + question))
        seconds["two engines"].append(request(plain, "first_token", ids=document + question))
    return {name: values[1:] for name, values in seconds.items()}


@contextmanager
def engine(folder: Path) -> Iterator[Connection]:
    """An engine in a process of its own, which idles without using a core."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs, folder))
    process.start()
    theirs.close()
    try:
        ours.recv()
        yield ours
    finally:
        ours.close()
        process.join(timeout=60)
        process.kill()


def request(peer: Connection, name: str, **arguments: Any) -> Any:
    """Have a peer do something, and what came out."""
    peer.send((name, arguments))
    return peer.recv()


def serve(peer: Connection, folder: Path) -> None:
    """The process of an engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import LLM

    llm = LLM(str(folder), dtype=serve_dtype(), **ENGINE_OPTIONS)
    work = {"embed": embed, "first_token": first_token, "beside": beside_texts}
    peer.send("ready")
    while True:
        try:
            name, arguments = peer.recv()
        except EOFError:
            return
        peer.send(work[name](llm, **arguments))


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
    core.engine_core.engine_core.scheduler._tokens_beside_chat = cap
    llm.reset_prefix_cache()
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
        "per_token": [float(row.mean()) for row in gaps],
        "gaps": [float(gap) for row in gaps for gap in row],
        "embedded": embedded / seconds,
    }


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    seconds = result["ask"]
    ratio = median(
        one / two for one, two in zip(seconds["one engine"], seconds["two engines"], strict=True)
    )
    lines = [
        "# How long chat waits",
        "",
        f"## Embed {DOCUMENT:,} tokens, then ask about them: seconds to the first token",
        "",
        "| one engine, one prefix cache | a chat engine of its own | ratio | aim |",
        "|---|---|---|---|",
        f"| {median(seconds['one engine']):.3f} | {median(seconds['two engines']):.3f} "
        f"| {ratio:.2f} | 0.2 |",
        "",
        f"## {CHATS} chats at a time, while texts of 200 to 260 tokens wait to be embedded",
        "",
        "Per token is a chat's mean time from one token to the next, its 99th percentile over",
        "chats; a gap is a single one of these times. Ratios are to chat alone. Texts are counted",
        "while all eight are being answered. A chat's first token waits for the texts that were",
        "there before it, unless requests have priorities.",
        "",
        "| `gem_tokens_beside_chat` | per token, p99, ms | ratio | gap, p99, ms | ratio "
        "| texts embedded, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    alone = result["beside"]["alone"]
    for name, row in result["beside"].items():
        cells = [{"alone": "no texts", "None": "not set"}.get(name, name)]
        for kind in ("per_token", "gaps"):
            mine, base = (np.percentile(each[kind], 99) for each in (row, alone))
            cells += [f"{1000 * mine:.1f}", f"{mine / base:.2f}"]
        cells.append(f"{row['embedded']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            "![the trade](latency.png)",
            "",
            "```",
            result["command"],
            "```",
            "",
            f"{result['hardware']}, {result['dtype']}, vLLM {result['vllm']}, {result['date']}, "
            f"commit {result['commit']}",
            "",
        ]
    )


def plot(beside: dict[str, Any], file: Path) -> None:
    """Chat's wait against what is embedded."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    base = np.percentile(beside["alone"]["per_token"], 99)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    rows = [(name, row) for name, row in beside.items() if name != "alone"]
    across = [row["embedded"] for _, row in rows]
    up = [np.percentile(row["per_token"], 99) / base for _, row in rows]
    axes.plot(across, up, marker="o")
    for (name, _), x, y in zip(rows, across, up, strict=True):
        label = "not set" if name == "None" else name
        axes.annotate(label, (x, y), textcoords="offset points", xytext=(5, 5))
    axes.set(
        xlabel="texts embedded, tokens/s",
        ylabel="time per token of chat, p99, against chat alone",
        title="gem_tokens_beside_chat",
        ylim=(0, None),
    )
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    run_script(main)
