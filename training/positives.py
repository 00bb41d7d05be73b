"""Positive pairs of the contrastive phase, of token ids without BOS or special tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

MIN_SPAN_TOKENS = 8
MAX_QUERY_TOKENS = 32
MAX_REST_TOKENS = 192
LEFT_IN = 0.1


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


def span_pair(
    token_ids: list[int], rng: random.Random, *, longest: int
) -> tuple[list[int], list[int]]:
    """Two random spans of one text, each of 8 to ``longest`` tokens, which may overlap (ours).

    Lengths are uniform: short spans name a text's topic, long ones say what it says of it.
    """
    return _span(token_ids, longest, rng), _span(token_ids, longest, rng)


def cloze_pair(token_ids: list[int], rng: random.Random) -> tuple[list[int], list[int]]:
    """A short span of a text, and the text without it: as a query and its document (ours).

    The inverse cloze task of Lee et al. (arXiv 1906.00300): the span has 8 to 32 tokens, the text
    192 around it at most, and one span in ten is left in, so that shared words count too.
    """
    start, length = _cut(token_ids, MAX_QUERY_TOKENS, rng)
    width = min(MAX_REST_TOKENS, len(token_ids))
    first = rng.randint(max(0, start + length - width), min(start, len(token_ids) - width))
    end = first + width
    query = token_ids[start : start + length]
    rest = token_ids[first:start] + token_ids[start + length : end]
    if rng.random() < LEFT_IN or len(rest) < MIN_SPAN_TOKENS:
        rest = token_ids[first:end]
    return query, rest


def passage(token_ids: list[int], rng: random.Random) -> list[int]:
    """The text, or as often a random span of it, of 192 tokens at most: passages and queries."""
    longest = min(len(token_ids), MAX_REST_TOKENS)
    if len(token_ids) > MIN_SPAN_TOKENS and rng.random() < 0.5:
        return _span(token_ids, longest, rng)
    return token_ids[:longest]


def shared_texts(pairs: Sequence[list[list[int]]]) -> torch.Tensor:
    """Which candidates are no negatives for a pair, as it has their text, too.

    pairs: token ids of each one's anchor, positive and negatives. Returns bool [N, N + M]: other
    pairs with the same anchor or positive, or the one's as the other's, and negatives that are
    either. Its first N columns are symmetric.
    """
    number: dict[tuple[int, ...], int] = {}
    ids = [[number.setdefault(tuple(text), len(number)) for text in pair] for pair in pairs]
    sides = torch.tensor([pair[:2] for pair in ids])  # [N, 2]
    negatives = torch.tensor([text for pair in ids for text in pair[2:]], dtype=torch.int64)
    same = (sides[:, None, :, None] == sides[:, None, :]).any(dim=3).any(dim=2)
    same.fill_diagonal_(False)
    return torch.cat([same, (sides[:, None] == negatives[:, None]).any(dim=2)], dim=1)


def _span(token_ids: list[int], most: int, rng: random.Random) -> list[int]:
    start, length = _cut(token_ids, most, rng)
    return token_ids[start : start + length]


def _cut(token_ids: list[int], most: int, rng: random.Random) -> tuple[int, int]:
    """Start and length of a random span of 8 to ``most`` tokens."""
    longest = min(most, len(token_ids))
    length = rng.randint(min(MIN_SPAN_TOKENS, longest), longest)
    return rng.randrange(len(token_ids) - length + 1), length
