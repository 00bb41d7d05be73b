"""The console command ``gem-vllm``: one module of ``gem_vllm.commands`` for each subcommand."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gem_vllm import __version__
from gem_vllm.commands.adapter import app as adapter
from gem_vllm.commands.demo import demo
from gem_vllm.commands.embed import embed
from gem_vllm.commands.evaluate import evaluate
from gem_vllm.commands.export import export
from gem_vllm.commands.fetch import fetch
from gem_vllm.commands.key import key
from gem_vllm.commands.mine import mine
from gem_vllm.commands.questions import questions
from gem_vllm.commands.serve import serve
from gem_vllm.commands.train import train
from gem_vllm.compat import installed_vllm
from gem_vllm.errors import GemError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(fetch)
app.command()(train)
app.command()(mine)
app.command()(questions)
app.add_typer(adapter, name="adapter")
app.command()(embed)
app.command()(serve)
app.command()(key)
app.command()(evaluate)
app.command()(export)
app.command()(demo)


def _tell_version(wanted: bool) -> None:
    if wanted:
        vllm = installed_vllm()
        typer.echo(f"gem-vllm {__version__}, {f'vLLM {vllm}' if vllm else 'without vLLM'}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_tell_version,
            is_eager=True,
            help="Show this version and that of the vLLM beside it, and exit.",
        ),
    ] = False,
) -> None:
    """Teach an LLM to embed, and serve embeddings and chat from one vLLM engine."""


def main() -> None:
    """Run the command line; exit 2 with one line for what the user can mend."""
    try:
        app()
    except GemError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
