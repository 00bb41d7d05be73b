"""``gem-vllm demo``: an LLM learns to embed, then embeds and chats from one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    examples: Annotated[Path, typer.Option(help="Folder with the example text.")] = Path(
        "examples"
    ),
    models: Annotated[Path, typer.Option(help="Folder that keeps the base model.")] = Path(
        "models"
    ),
    out: Annotated[Path, typer.Option(help="Folder for this run; made anew.")] = Path("runs/demo"),
    train_minutes: Annotated[float, typer.Option(help="About how long to train.")] = 3.0,
) -> None:
    """Train a small adapter, serve it, search and chat with it: minutes, and no GPU needed.

    Trains SmolLM2-135M-Instruct on Wikipedia text to embed, shows how well it finds a sentence's
    own paragraph before and after, starts `vllm serve`, indexes 512 passages and answers three
    questions from them, all by one server. Ctrl-C at any point stops everything it started.
    """
    from rich.console import Console

    from gem_vllm.demo.run import DemoOptions, run_demo

    options = DemoOptions(examples=examples, models=models, out=out, train_minutes=train_minutes)
    run_demo(options, Console())
