"""``gem-vllm key``: a new API key for an endpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.commands.on_ray import require_ray


def key(
    file: Annotated[Path, typer.Argument(help="File of keys; made if it is not there.")],
    name: Annotated[str, typer.Argument(help="Who gets the key.")],
) -> None:
    """Make an API key for `gem-vllm serve --api-keys FILE`, and print it once.

    The file gets the key's hash: whoever reads the file does not have the key. An endpoint that is
    running takes it up at once; remove a line to lock its key out.
    """
    require_ray("key")
    from gem_vllm.serving.endpoint.keys import new_key

    typer.echo(new_key(file, name))
    print(f"added to {file}; this is the only time that the key is shown", file=sys.stderr)
