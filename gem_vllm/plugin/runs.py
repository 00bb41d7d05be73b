"""Runs of special tokens within a sequence, and where the engine puts them.

Behind a run a sequence sees the run and what follows it, and nothing before (`gem_vllm.mask`). In
paged attention that is a block table that starts with the run's block, if the run starts one. So
the engine puts padding before every run inside a prompt, up to the next KV block. Padding is the
first special token, repeated: the last k ids of a block of special ids are the run, what is before
them is padding. No row that is read sees padding, and positions count up as if there were none.

The run behind a text that is embedded has nothing behind it, and gets no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gem_vllm.config import special_token
from gem_vllm.errors import GemError


@dataclass(frozen=True)
class Run:
    """A run in a sequence of the engine's, padding included.

    Its special tokens see the positions ``seen_from`` to ``seen_to`` - 1, and themselves.

    Attributes:
        seen_from: start of the run before, 0 for the first.
        seen_to: end of the text before, where the padding starts.
        start: of the run's first special token.
        end: behind its last one.
    """

    seen_from: int
    seen_to: int
    start: int
    end: int

    @property
    def padding(self) -> int:
        """Tokens of padding before it."""
        return self.start - self.seen_to


def check_runs(token_ids: Sequence[int], special_ids: Sequence[int]) -> None:
    """Raise GemError where special tokens are anything but whole runs, each behind some text.

    Args:
        token_ids: a prompt, without padding.
        special_ids: the k special tokens in their order.
    """
    for start, end in _blocks(token_ids, special_ids):
        if list(token_ids[start:end]) != list(special_ids):
            names = special_token(0)
            if len(special_ids) > 1:
                names += f" to {special_token(len(special_ids) - 1)}"
            raise GemError(
                f"the special tokens at position {start} of the prompt are no whole run: a run is "
                f"{names}, each once and in this order, with other tokens before and behind"
            )
        if start == 0:
            raise GemError(
                "the prompt starts with special tokens; put the text that they read before them"
            )


def pad_runs(token_ids: Sequence[int], special_ids: Sequence[int], block_size: int) -> list[int]:
    """The prompt with padding, so that each run starts a block of ``block_size`` tokens.

    Args:
        token_ids: a prompt that `check_runs` passes.
        special_ids: the k special tokens in their order.
        block_size: of the KV cache.
    """
    padded: list[int] = []
    copied = 0
    for start, _ in _blocks(token_ids, special_ids):
        padded += token_ids[copied:start]
        padded += [special_ids[0]] * (-len(padded) % block_size)
        copied = start
    return padded + list(token_ids[copied:])


def find_runs(token_ids: Sequence[int], special_ids: Sequence[int]) -> tuple[Run, ...]:
    """The runs of a sequence, in their order.

    Args:
        token_ids: as the engine has them, with padding.
        special_ids: the k special tokens in their order.
    """
    runs: list[Run] = []
    for start, end in _blocks(token_ids, special_ids):
        seen_from = runs[-1].start if runs else 0
        runs.append(Run(seen_from, start, end - len(special_ids), end))
    return tuple(runs)


def _blocks(token_ids: Sequence[int], special_ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Start and end of each maximal block of special ids."""
    special = set(special_ids)
    if special.isdisjoint(token_ids):
        return
    # Of every request's prompt, so in as little Python a token as there can be.
    positions = [position for position, token_id in enumerate(token_ids) if token_id in special]
    start = positions[0]
    for before, position in pairwise(positions):
        if position > before + 1:
            yield start, before + 1
            start = position
    yield start, positions[-1] + 1
