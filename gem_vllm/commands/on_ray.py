"""What the subcommands that run on Ray share."""

from __future__ import annotations

from gem_vllm.errors import GemError


def require_ray(command: str) -> None:
    """Raise GemError, with what to install, where Ray is missing."""
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise GemError(
            f"gem-vllm {command} needs Ray; install it with: pip install 'gem-vllm[ray]'"
        ) from error
