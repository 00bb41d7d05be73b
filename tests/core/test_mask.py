"""The mask in its three forms, against the definition read out loud."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gem_vllm.mask import gem_intervals, gem_mask, gem_mask_mod

ORDINARY = range(100, 105)


def brute_force(ids, special_ids, window=None):
    """Rows of booleans; runs as (start, end), `own` the run of a special token."""
    is_special = [i in special_ids for i in ids]
    edges = [False, *is_special, False]
    starts = [i for i in range(len(ids)) if edges[i + 1] and not edges[i]]
    ends = [i for i in range(len(ids)) if edges[i + 1] and not edges[i + 2]]
    runs = list(zip(starts, ends, strict=True))

    def sees(i, j):
        b = max([0, *(start for start, end in runs if end < i)])
        own = next(((start, end) for start, end in runs if start <= i <= end), (i, i))
        in_window = window is None or i == j or j > own[0] - window
        return b <= j <= i and not (i != j and own[0] <= j <= own[1]) and in_window

    return [[sees(i, j) for j in range(len(ids))] for i in range(len(ids))]


@st.composite
def batches(draw):
    """Special ids, and 1 to 4 sequences of different lengths with any number of runs."""
    special = list(range(1, draw(st.integers(1, 16)) + 1))
    piece = st.one_of(
        st.lists(st.sampled_from(ORDINARY), max_size=6),
        st.just(special),
        st.lists(st.sampled_from(special), min_size=1, max_size=4),
    )
    sequence = st.lists(piece, min_size=1, max_size=5).map(lambda p: [*chain(*p)])
    return special, draw(st.lists(sequence.filter(bool), min_size=1, max_size=4))


@settings(max_examples=150)
@given(batches(), st.one_of(st.none(), st.integers(1, 12)))
def test_mask_is_the_definition(batch, window):
    special, sequences = batch
    for ids in sequences:
        mask = gem_mask(torch.tensor(ids), special, sliding_window=window)
        assert mask.tolist() == brute_force(ids, special, window)


@given(batches(), st.sampled_from(["left", "right"]), st.sampled_from([0, 1]))
def test_padding_changes_nothing(batch, side, pad_id):
    """Whatever the side, and even where the padding's id is a special token's."""
    special, sequences = batch
    longest = max(map(len, sequences))
    token_ids = torch.full((len(sequences), longest), pad_id)
    real = torch.zeros_like(token_ids)
    for row, ids in enumerate(sequences):
        span = slice(longest - len(ids), None) if side == "left" else slice(0, len(ids))
        token_ids[row, span], real[row, span] = torch.tensor(ids), 1
    masks = gem_mask(token_ids, special, attention_mask=real)
    for mask, kept, ids in zip(masks, real.bool(), sequences, strict=True):
        assert mask[kept][:, kept].tolist() == brute_force(ids, special)
        assert not mask[kept][:, ~kept].any()
        assert torch.equal(mask[~kept], torch.eye(longest, dtype=torch.bool)[~kept])


@given(batches(), st.one_of(st.none(), st.integers(1, 12)))
def test_intervals_and_mask_mod_are_the_mask(batch, window):
    special, sequences = batch
    length = min(map(len, sequences))
    token_ids = torch.tensor([ids[:length] for ids in sequences])
    expected = gem_mask(token_ids, special, sliding_window=window)

    start, end = gem_intervals(token_ids, special, sliding_window=window)
    assert start.dtype == end.dtype == torch.int64
    column = torch.arange(length)
    inside = (column >= start[..., None]) & (column < end[..., None])
    assert torch.equal(inside | torch.eye(length, dtype=torch.bool), expected)

    mask_mod = gem_mask_mod(token_ids, special, sliding_window=window)
    b, q, kv = torch.meshgrid(
        torch.arange(len(sequences)), torch.arange(length), torch.arange(length), indexing="ij"
    )
    assert torch.equal(mask_mod(b, torch.zeros_like(b), q, kv), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_mask_mod_in_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    special = [1, 2, 3]
    token_ids = torch.tensor([[9, 9, 1, 2, 3, 9, 9, 2, 9], [1, 2, 9, 9, 9, 9, 1, 2, 3]])
    query, key, value = torch.randn(3, 2, 4, 9, 16)
    block_mask = create_block_mask(gem_mask_mod(token_ids, special), 2, None, 9, 9, device="cpu")
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=gem_mask(token_ids, special)[:, None]
    )
    flex = flex_attention(query, key, value, block_mask=block_mask)
    torch.testing.assert_close(flex, dense)


def test_papers_picture():
    """One run: prefix causal, special tokens see the prefix, the suffix sees special and itself."""
    mask = gem_mask(torch.tensor([7, 7, 1, 2, 7, 7]), [1, 2]).int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3, 5)])
def test_any_number_of_leading_dimensions(shape):
    token_ids = torch.full(shape, 7)
    causal = torch.ones(*shape, shape[-1], dtype=torch.bool).tril()
    assert torch.equal(gem_mask(token_ids, [1]), causal)
