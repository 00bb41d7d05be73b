"""The table at the end of the demo."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from gem_vllm.demo.client import Totals
from gem_vllm.demo.retrieval import RetrievalScore
from gem_vllm.demo.server import SERVED_NAME, serve_command
from gem_vllm.machine import serve_environment


@dataclass
class Report:
    """What the demo measured; filled in as it goes."""

    checkpoint: Path
    passages: int
    queries: int
    before: RetrievalScore | None = None
    after: RetrievalScore | None = None
    train_steps: int = 0
    train_texts: int = 0
    train_minutes: float = 0.0
    indexed: Totals = field(default_factory=Totals)
    index_seconds: float = 0.0
    answered: Totals = field(default_factory=Totals)
    background: Totals = field(default_factory=Totals)
    ask_seconds: float = 0.0
    steps: dict[str, int] = field(default_factory=dict)
    minutes: float = 0.0


def table(report: Report) -> Table:
    """What was trained, how well it finds, how fast it serves."""
    rows = Table(title="\ngem-vllm demo", title_justify="left", show_header=False)
    for name, value in _rows(report):
        rows.add_row(name, value)
    return rows


def _rows(report: Report) -> list[tuple[str, str]]:
    assert report.before
    assert report.after
    return [
        (
            "trained",
            f"a k = 1 adapter, {report.train_steps} steps, {report.train_texts:,} texts, "
            f"{report.train_minutes:.1f} minutes; the base's weights are unchanged",
        ),
        (
            "task",
            f"find a sentence's paragraph among {report.passages}, {report.queries} sentences",
        ),
        ("accuracy@1", _change(report.before.accuracy_at_1, report.after.accuracy_at_1)),
        ("MRR@10", _change(report.before.mrr_at_10, report.after.mrr_at_10)),
        ("indexing", _speed(report.indexed, report.index_seconds)),
        (
            "answers",
            f"{report.answered.texts}, streamed at "
            f"{report.answered.tokens / report.ask_seconds:.1f} tokens/s",
        ),
        ("embedded meanwhile", _speed(report.background, report.ask_seconds)),
        (
            "mixed steps",
            f"{report.steps.get('mixed', 0)} steps of the engine held embedding and chat at once",
        ),
        ("time", f"{report.minutes:.1f} minutes"),
    ]


def _change(before: float, after: float) -> str:
    return f"{before:.3f} (mean pooling of the base) -> {after:.3f} (served)"


def _speed(totals: Totals, seconds: float) -> str:
    return (
        f"{totals.texts} texts, {totals.texts / seconds:.1f} texts/s, "
        f"{totals.tokens / seconds:.0f} tokens/s"
    )


def next_commands(checkpoint: Path) -> str:
    """The commands to go on with: the server that has just been seen to work, and requests."""
    wanted = serve_environment()
    set_here = {
        name: wanted[name] for name in sorted(wanted) if os.environ.get(name) != wanted[name]
    }
    variables = "".join(f"{name}={shlex.quote(value)} " for name, value in set_here.items())
    gem_vllm = shlex.quote(str(Path(sys.executable).with_name("gem-vllm")))
    return f"""
Go on with:

  {variables}{shlex.join(serve_command(checkpoint, 8000))}

  curl http://localhost:8000/v1/embeddings -H 'Content-Type: application/json' \\
    -d '{{"model": "{SERVED_NAME}", "input": "a text to embed"}}'

  curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{SERVED_NAME}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  {gem_vllm} train --help
"""
