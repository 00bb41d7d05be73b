"""The demo from start to end: base, score, train, serve, index, ask, and a table."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from gem_vllm.commands.fetch import fetch_model
from gem_vllm.compat import check_vllm_version
from gem_vllm.demo.client import Client, Totals
from gem_vllm.demo.report import Report, next_commands, table
from gem_vllm.demo.retrieval import (
    Embeddings,
    RetrievalTask,
    embed_with_base,
    load_task,
    nearest,
    read_texts,
    score,
)
from gem_vllm.demo.server import CONTEXT_TOKENS, serve
from gem_vllm.errors import GemError
from gem_vllm.processes import process_group, terminated_like_interrupted, wait_for

BASE = "smollm2-135m-instruct"
PASSAGES = 512
QUERIES = 256
BATCH_SIZE = 32
TRAIN_TOKENS = 32
DROP_RATE = 0.8
# Forward passes of the tokens that a training step costs: 1, and the backward pass.
STEP_COST = 1.3
STEPS_AT_LEAST, STEPS_AT_MOST = 10, 300
RETRIEVED = 3
RUN_MARK = ".gem-vllm-demo"
BACKGROUND_REQUESTS = 1
QUESTIONS = (
    "How were Viking chiefs buried?",
    "Which company makes sunglasses for fishing and boating?",
    "What was the first eco-friendly mosque in Europe?",
)
SYSTEM_PROMPT = "Answer the question from the passages, in one short sentence."


@dataclass(frozen=True)
class DemoOptions:
    """Where the demo reads and writes, and how long it trains.

    Attributes:
        examples: folder with ``wikipedia_train.txt`` and ``wikipedia_held_back.txt``.
        models: folder that keeps the base model between runs.
        out: folder for this run; made anew.
        train_minutes: about how long the training is to take.
    """

    examples: Path
    models: Path
    out: Path
    train_minutes: float

    @property
    def train_file(self) -> Path:
        """What the adapter is trained on."""
        return self.examples / "wikipedia_train.txt"

    @property
    def checkpoint(self) -> Path:
        """What is trained and served."""
        return self.out / "checkpoint"


def run_demo(options: DemoOptions, console: Console) -> None:
    """Run every part, one after another; raise GemError where one cannot go on.

    No process that was started outlives this call, whatever ends it.
    """
    started = time.monotonic()
    # Before torch is imported, here and in the training: threads that wait for one another without
    # spinning do not stand in the way of another program's.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    check_vllm_version()
    if not 0 < options.train_minutes < math.inf:
        raise GemError("--train-minutes must be greater than 0, and finite")
    background = read_texts(options.train_file)
    task = load_task(
        options.examples / "wikipedia_held_back.txt", passages=PASSAGES, queries=QUERIES
    )
    report = Report(checkpoint=options.checkpoint, passages=PASSAGES, queries=QUERIES)
    with terminated_like_interrupted():
        _remove_last_run(options.out)
        base = _get_base(options, console)
        tokens_per_second = _score_base(base, task, report, console)
        _train(options, base, tokens_per_second, report, console)
        log = options.out / "server.log"
        _heading(console, 4, f"Start vllm serve (its log: {log})")
        with console.status("starting") as status:

            def on_wait(seconds: float) -> None:
                status.update(f"starting, {seconds:.0f} s")

            with serve(options.checkpoint, log, on_wait) as url:
                status.stop()
                asyncio.run(_use_server(url, task, background, report, console))
    report.minutes = (time.monotonic() - started) / 60
    console.print(table(report))
    console.print(next_commands(report.checkpoint), markup=False, highlight=False, soft_wrap=True)


def steps_for(minutes: float, tokens_per_second: float) -> int:
    """How many training steps fit in ``minutes``, from the measured speed of a forward pass.

    A step runs each row and its positive, which has `DROP_RATE` fewer tokens.
    """
    step_tokens = BATCH_SIZE * TRAIN_TOKENS * (2 - DROP_RATE)
    steps = minutes * 60 * tokens_per_second / (STEP_COST * step_tokens)
    return round(min(max(steps, STEPS_AT_LEAST), STEPS_AT_MOST))


def _remove_last_run(out: Path) -> None:
    out = Path(os.path.realpath(out))
    if out.exists():
        if not out.is_dir() or (any(out.iterdir()) and not (out / RUN_MARK).exists()):
            raise GemError(f"{out} holds something else; remove it, or choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / RUN_MARK).touch()


def _heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/6  {text}[/bold]", highlight=False)


def _get_base(options: DemoOptions, console: Console) -> Path:
    _heading(console, 1, "The base model: SmolLM2-135M-Instruct")
    base = fetch_model(BASE, options.models / "SmolLM2-135M-Instruct")
    console.print(f"in {base}", highlight=False)
    return base


def _score_base(base: Path, task: RetrievalTask, report: Report, console: Console) -> float:
    """Fill in the score before training; return the speed of a forward pass in tokens/s."""
    _heading(console, 2, f"Before: find a sentence's own paragraph among {PASSAGES}")
    with console.status("embedding by mean pooling"):
        embeddings = embed_with_base(base, task, max_tokens=CONTEXT_TOKENS)
    report.before = score(embeddings.queries, embeddings.passages)
    console.print(
        f"{QUERIES} held-back sentences, mean pooling of the base: accuracy@1 "
        f"{report.before.accuracy_at_1:.3f}, MRR@10 {report.before.mrr_at_10:.3f}"
    )
    return embeddings.tokens_per_second


def _train(
    options: DemoOptions, base: Path, tokens_per_second: float, report: Report, console: Console
) -> None:
    steps = steps_for(options.train_minutes, tokens_per_second)
    _heading(console, 3, f"Train a k = 1 adapter: {steps} steps of {BATCH_SIZE} texts")
    arguments = [
        "train",
        *("--base", str(base)),
        *("--data", str(options.train_file)),
        *("--out", str(options.checkpoint)),
        *("--special-tokens", "1"),
        *("--steps", str(steps)),
        *("--batch-size", str(BATCH_SIZE)),
        *("--max-tokens", str(TRAIN_TOKENS)),
        *("--drop-rate", str(DROP_RATE)),
    ]
    console.print("$ gem-vllm " + " ".join(arguments), highlight=False, soft_wrap=True)
    started = time.monotonic()
    with process_group([sys.executable, "-m", "gem_vllm.cli", *arguments]) as training:
        wait_for(training, "gem-vllm train")
    report.train_minutes = (time.monotonic() - started) / 60
    report.train_steps = steps
    report.train_texts = steps * BATCH_SIZE


async def _use_server(
    url: str, task: RetrievalTask, background: Sequence[str], report: Report, console: Console
) -> None:
    async with Client(url) as client:
        passages = await _index(client, task, report, console)
        _heading(console, 6, "Ask: retrieve and answer, while other texts are being embedded")
        async with _embedding_in_background(client, background, report.background):
            asked = time.monotonic()
            for question in QUESTIONS:
                await _ask(client, question, task.passages, passages, report, console)
            report.ask_seconds = time.monotonic() - asked
        report.steps = await client.step_counts()


async def _index(
    client: Client, task: RetrievalTask, report: Report, console: Console
) -> Embeddings:
    _heading(console, 5, f"Index {PASSAGES} held-back passages through /v1/embeddings")
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    started = time.monotonic()
    with progress:
        bar = progress.add_task("passages", total=len(task.passages))
        passages = await client.embed_all(
            task.passages, totals=report.indexed, on_progress=lambda n: progress.advance(bar, n)
        )
        report.index_seconds = time.monotonic() - started
        bar = progress.add_task("sentences", total=len(task.queries))
        queries = await client.embed_all(
            task.queries, totals=Totals(), on_progress=lambda n: progress.advance(bar, n)
        )
    report.after = score(queries, passages)
    console.print(
        f"the same {QUERIES} sentences, served by vLLM: accuracy@1 "
        f"{report.after.accuracy_at_1:.3f}, MRR@10 {report.after.mrr_at_10:.3f}"
    )
    return passages


@contextlib.asynccontextmanager
async def _embedding_in_background(
    client: Client, texts: Sequence[str], totals: Totals
) -> AsyncIterator[None]:
    """Keep `BACKGROUND_REQUESTS` embedding requests under way for as long as the block runs."""
    waiting = itertools.cycle(texts)

    async def embed_for_ever() -> None:
        while True:
            await client.embed([next(waiting)], totals)

    workers = [asyncio.create_task(embed_for_ever()) for _ in range(BACKGROUND_REQUESTS)]
    try:
        yield
    finally:
        for worker in workers:
            worker.cancel()
        for outcome in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome


async def _ask(
    client: Client,
    question: str,
    texts: Sequence[str],
    passages: Embeddings,
    report: Report,
    console: Console,
) -> None:
    console.print(f"\n[bold cyan]{question}[/bold cyan]", highlight=False)
    (query,) = await client.embed([question])
    found = nearest(query, passages, RETRIEVED)
    for row, cosine in found:
        line = Text(f"  {cosine:.3f}  {texts[row]}", style="dim")
        console.print(line, overflow="ellipsis", no_wrap=True)
    context = "\n\n".join(texts[row] for row, _ in found)
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"Passages:\n\n{context}\n\nQuestion: {question}"},
    ]
    console.print("  > ", end="", highlight=False)
    async for piece in client.chat(messages, report.answered):
        console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
    console.print()
