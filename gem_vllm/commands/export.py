"""``gem-vllm export``: a checkpoint in the form that another library loads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.errors import GemError


class Form(StrEnum):
    sentence_transformers = "sentence-transformers"


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A GEM checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    to: Annotated[Form, typer.Option(help="Whose form.")] = Form.sentence_transformers,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint that is there.")
    ] = False,
) -> None:
    """Write a checkpoint for sentence-transformers, and so for what builds on it.

    SentenceTransformer(FOLDER, trust_remote_code=True) loads the folder where gem-vllm is
    installed, and gives the vectors that the engine gives.
    """
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise GemError(
            "gem-vllm export needs sentence-transformers; install it with: "
            "pip install -e '.[eval]', in the folder of gem-vllm's source"
        ) from error
    from gem_vllm.folders import refuse_existing, refuse_inside
    from gem_vllm.sentence_transformer import export as export_checkpoint

    if out.resolve() != checkpoint.resolve():
        refuse_inside(out, checkpoint)
        refuse_existing(out, overwrite=overwrite)
    export_checkpoint(checkpoint, out)
    typer.echo(out)
