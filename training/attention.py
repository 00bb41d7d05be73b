"""Attention of a few queries over many cached keys, without a copy of the keys for every head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "gem_grouped"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Eager attention that serves all heads of a group from one copy of their keys and values.

    transformers' SDPA repeats keys and values for every query head as soon as there is a mask, and
    keeps the copies for the backward pass: for k queries they would be nearly all of its memory.

    query: [N, H, k, D]; key, value: [N, G, S, D], G dividing H; attention_mask: additive
    [N or 1, 1, k, S]. Returns [N, k, H, D], and no weights.
    """
    rows, heads, queries, _ = query.shape
    groups = key.shape[1]
    scores = query.reshape(rows, groups, -1, query.shape[-1]) @ key.transpose(2, 3) * scaling
    scores = scores.view(rows, heads, queries, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(value.dtype)
    output = weights.view(rows, groups, -1, key.shape[2]) @ value
    return output.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)


def grouped(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let ``model`` compute with `grouped_attention`."""
    return _implementation(model, NAME)


def flex_attention(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let ``model`` compute with FlexAttention, and take its block masks."""
    return _implementation(model, "flex_attention")


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    usual = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
