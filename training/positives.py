"""Positive pairs of the contrastive phase, of token ids without BOS or special tokens."""

from __future__ import annotations

import random
from typing import Literal

Positives = Literal["dropout", "spans", "mix"]

MIN_SPAN_TOKENS = 8
MAX_SPAN_TOKENS = 64


def dropout_pair(
    token_ids: list[int], rate: float, rng: random.Random, *, anchor_rate: float = 0.0
) -> tuple[list[int], list[int]]:
    """A text, and the same text with a share ``rate`` of its tokens dropped (the paper, 3.3).

    Each token is dropped independently; one token at least is kept. With ``anchor_rate`` the text
    itself loses tokens, too (ours): where both sides lack something, neither holds the other.
    """
    return _dropped(token_ids, anchor_rate, rng), _dropped(token_ids, rate, rng)


def _dropped(token_ids: list[int], rate: float, rng: random.Random) -> list[int]:
    if rate == 0.0:
        return token_ids
    kept = [token for token in token_ids if rng.random() >= rate]
    return kept or [rng.choice(token_ids)]


def span_pair(token_ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """Two random spans of one text, each of 8 to 64 tokens, which may overlap (ours).

    Lengths are uniform: short spans name a text's topic, long ones say what it says of it.
    """
    return _span(token_ids, rng), _span(token_ids, rng)


def _span(token_ids: list[int], rng: random.Random) -> list[int]:
    longest = min(MAX_SPAN_TOKENS, len(token_ids))
    shortest = min(MIN_SPAN_TOKENS, longest)
    length = rng.randint(shortest, longest)
    start = rng.randrange(len(token_ids) - length + 1)
    return token_ids[start : start + length]
