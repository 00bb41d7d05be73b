"""What the subcommands that run on Ray share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from gem_vllm.errors import GemError


def require_ray(command: str) -> None:
    """Raise GemError, with what to install, where Ray is missing."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise GemError(
            f"gem-vllm {command} needs Ray; install it with: "
            "pip install -e '.[ray]', in the folder of gem-vllm's source"
        ) from error


@contextmanager
def exit_codes(stopped: str) -> Iterator[None]:
    """Exit with 130 where the command is interrupted, with 1 where what it has begun cannot go on.

    Args:
        stopped: what to say to whoever has interrupted it.
    """
    from gem_vllm.serving.errors import JobError

    try:
        yield
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        raise typer.Exit(130) from None
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
