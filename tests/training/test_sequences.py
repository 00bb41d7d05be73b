"""Positives, mixed sequences, and the loss mask."""

from __future__ import annotations

import random

import torch

from gem_vllm.training.positives import (
    MIN_SPAN_TOKENS,
    cloze_pair,
    dropout_pair,
    shared_texts,
    span_pair,
)
from gem_vllm.training.sequences import (
    IGNORE,
    Template,
    mixed_sequence,
    next_token_targets,
    pad,
)

SPECIAL = (90, 91, 92)
BOS = Template((1,), ())


def test_dropout_drops_its_share_and_keeps_the_order() -> None:
    content = list(range(10_000))
    anchor, positive = dropout_pair(content, 0.3, random.Random(0))
    assert anchor == content
    assert positive == sorted(set(positive))
    assert 0.68 < len(positive) / len(content) < 0.72


def test_dropout_on_both_sides() -> None:
    content = list(range(10_000))
    anchor, positive = dropout_pair(content, 0.5, random.Random(0), anchor_rate=0.3)
    assert 0.68 < len(anchor) / len(content) < 0.72
    assert 0.48 < len(positive) / len(content) < 0.52
    both = set(anchor) & set(positive)
    assert 0.33 < len(both) / len(content) < 0.37, "the sides lose tokens independently"


def test_dropout_leaves_one_token_at_least() -> None:
    rng = random.Random(0)
    assert all(len(dropout_pair([5, 6], 0.99, rng)[1]) >= 1 for _ in range(200))


def test_spans_are_of_the_text_and_of_all_lengths() -> None:
    rng, content = random.Random(0), list(range(300))
    spans = [span for _ in range(2000) for span in span_pair(content, rng, longest=64)]
    assert all(span == list(range(span[0], span[0] + len(span))) for span in spans)
    assert {len(span) for span in spans} == set(range(MIN_SPAN_TOKENS, 65))
    assert len(span_pair([1, 2, 3], rng, longest=64)[0]) == 3, "a short text is its own span"


def test_a_cloze_pair_is_a_short_span_and_what_is_around_it() -> None:
    content, rng = list(range(1000, 1400)), random.Random(0)
    left_in, beside = 0, list[tuple[int, int]]()
    for _ in range(2000):
        query, rest = cloze_pair(content, rng)
        assert 8 <= len(query) <= 32
        assert query == list(range(query[0], query[0] + len(query)))
        assert rest == sorted(set(rest))
        assert len(rest) <= 192
        near = {*rest, *query}
        assert near == set(range(min(near), max(near) + 1)), "one stretch of the text"
        assert len(near) == 192, "up to the stated maximum, the span included"
        assert set(query) <= set(rest) or set(query).isdisjoint(rest)
        left_in += set(query) <= set(rest)
        beside.append((query[0] - min(near), max(near) - query[-1]))
    assert 100 < left_in < 300
    assert sum(min(sides) > 0 for sides in beside) > 1800, "the rest is on both sides"
    assert min(map(max, zip(*beside, strict=True))) > 150, "the span may be anywhere in it"
    short = cloze_pair([1, 2, 3, 4, 5, 6, 7, 8, 9], rng)
    assert short[1] == [1, 2, 3, 4, 5, 6, 7, 8, 9], "too little would be left"


def test_shared_texts_are_found_on_either_side() -> None:
    a, b, c, d, e = ([number] for number in range(5))
    x = True
    # The second pair has the first one's positive, and its anchor is the third one's positive; the
    # negatives, e and c of the first and a of the fourth, are texts of other pairs.
    found = shared_texts([[a, b, e, c], [c, b], [d, c], [e, e, a]])
    assert found.int().tolist() == [
        [0, x, 0, 0, 0, 0, x],
        [x, 0, x, 0, 0, x, 0],
        [0, x, 0, 0, 0, x, 0],
        [0, 0, 0, 0, x, 0, 0],
    ]
    assert not shared_texts([[a, a], [b, b]]).any(), "a text is no repeat of itself"


def rows(raw_share: float, reconstruction_share: float, max_tokens: int = 40) -> list[list[int]]:
    rng = random.Random(0)
    return [
        mixed_sequence(
            list(range(10, 10 + rng.randint(8, 40))),
            SPECIAL,
            BOS,
            raw_share=raw_share,
            reconstruction_share=reconstruction_share,
            max_tokens=max_tokens,
            rng=rng,
        )
        for _ in range(500)
    ]


def test_shares_of_the_mix() -> None:
    mixed = rows(0.8, 0.5)
    special = [row for row in mixed if SPECIAL[0] in row]
    assert 0.15 < len(special) / len(mixed) < 0.25
    repeated = [row for row in special if row.count(10) == 2]
    assert 0.35 < len(repeated) / len(special) < 0.65


def test_every_sequence_is_well_formed() -> None:
    for row in rows(0.3, 0.5):
        assert row[0] == 1
        assert len(row) <= 40
        if SPECIAL[0] in row:
            at = row.index(SPECIAL[0])
            assert tuple(row[at : at + 3]) == SPECIAL
            prefix, suffix = row[1:at], row[at + 3 :]
            assert prefix
            assert suffix
            whole = prefix == suffix or prefix + suffix == list(
                range(10, 10 + len(prefix + suffix))
            )
            assert whole
        else:
            assert row == [1, *range(10, 9 + len(row))]


def test_an_instruction_is_between_prefix_and_special_tokens() -> None:
    template = Template((1,), (2,), (7, 8))
    assert template.wrap([10, 11]) == [1, 10, 11, 2]
    assert template.wrap_to_embed([10, 11]) == [1, 10, 11, 2, 7, 8]
    assert template.length == 4
    shares = {"raw_share": 0.0, "reconstruction_share": 1.0, "rng": random.Random(0)}
    row = mixed_sequence(list(range(10, 40)), SPECIAL, template, max_tokens=20, **shares)
    assert row == [1, *range(10, 17), 7, 8, *SPECIAL, *range(10, 17)]
    shares["raw_share"] = 1.0
    assert 7 not in mixed_sequence([10, 11], SPECIAL, template, max_tokens=20, **shares)


def test_padding_and_loss_mask() -> None:
    token_ids, lengths = pad([[1, 10, 11, *SPECIAL, 12, 13], [1, 20, 21]])
    assert lengths.tolist() == [8, 3]
    x = IGNORE
    assert next_token_targets(token_ids, lengths, SPECIAL).tolist() == [
        # Of the run, the last alone predicts: where the suffix starts.
        [10, 11, x, x, x, 12, 13, x],
        [20, 21, x, x, x, x, x, x],
    ]


def test_an_instruction_is_never_a_target() -> None:
    """Nor does the text's last token predict it; raw texts, without one, are as they were."""
    token_ids, lengths = pad([[1, 10, 11, 7, 8, *SPECIAL, 10, 11], [1, 7, 8, 20], [7, 8, *SPECIAL]])
    x = IGNORE
    assert next_token_targets(token_ids, lengths, SPECIAL, 2).tolist() == [
        [10, 11, x, x, x, x, x, 10, 11, x],
        [7, 8, 20, *[x] * 7],
        [x] * 10,
    ]


def test_no_special_token_is_ever_a_target() -> None:
    token_ids, lengths = pad(rows(0.2, 0.5))
    targets = next_token_targets(token_ids, lengths, SPECIAL)
    assert not torch.isin(targets, torch.tensor(SPECIAL)).any()
    special = torch.isin(token_ids, torch.tensor(SPECIAL))
    assert (targets[special] != IGNORE).sum() == (token_ids == SPECIAL[-1]).sum()
