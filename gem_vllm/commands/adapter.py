"""``gem-vllm adapter``: take an adapter out of a checkpoint, put one together with its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint or adapter that is there.")
]

app = typer.Typer(
    help="Take the adapter out of a GEM checkpoint, or put one together with its base model.",
    no_args_is_help=True,
)


@app.command()
def extract(
    checkpoint: Annotated[
        Path, typer.Argument(help="A GEM checkpoint that was trained with --mode adapter.")
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the adapter to.")],
    overwrite: Overwrite = False,
) -> None:
    """Write the adapter alone: what was trained, without the base model's weights.

    For a 135M base and rank 16 that is about 10 MB, small enough to share. Whoever has the same
    base model gets the checkpoint back with `gem-vllm adapter apply`.
    """
    from gem_vllm.adapter_files import extract_adapter
    from gem_vllm.folders import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    extract_adapter(checkpoint, out)
    typer.echo(out)


@app.command()
def apply(
    base: Annotated[Path, typer.Option(help="The base model, a Hugging Face folder.")],
    adapter: Annotated[Path, typer.Option(help="A folder written by `gem-vllm adapter extract`.")],
    out: Annotated[Path, typer.Option(help="Folder to write the GEM checkpoint to.")],
    overwrite: Overwrite = False,
) -> None:
    """Put a base model and an adapter together: the result is ready for `vllm serve`.

    The base must have the very weights that the adapter was trained on; this is checked. Its
    folder is only read.
    """
    from gem_vllm.adapter_files import apply_adapter
    from gem_vllm.folders import refuse_existing

    refuse_existing(out, overwrite=overwrite)
    apply_adapter(base, adapter, out)
    typer.echo(out)
