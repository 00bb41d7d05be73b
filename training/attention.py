"""Attention of a few queries over many cached keys, without a copy of the keys for every head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from gem_vllm.training.prefix import Prefix

NAME = "gem_grouped"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    *,
    prefix: Prefix,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Eager attention of k queries over the keys of a prefix and their own.

    transformers would join the two, and its SDPA repeat them for every query head as soon as there
    is a mask; copies that the backward pass keeps, as it would compute gradients of the prefix,
    which nobody asks for. Here it is read where it lies, by all heads of a group.

    query: [N, H, k, D]; key, value: [N, G, k, D], G dividing H; prefix: of each layer as many rows,
    [N, G, S, D]; attention_mask: additive [N or 1, 1, k, S + k]. Returns [N, k, H, D], no weights.
    """
    rows, heads, queries, _ = query.shape
    groups = key.shape[1]
    keys, values = prefix.keys[module.layer_idx], prefix.values[module.layer_idx]
    grouped_query = query.reshape(rows, groups, -1, query.shape[-1])
    scores = torch.cat([grouped_query @ each.transpose(2, 3) for each in (keys, key)], -1)
    scores = scores.view(rows, heads, queries, -1) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + attention_mask, dim=-1, dtype=torch.float32).to(value.dtype)
    seen, own = weights.view(rows, groups, -1, scores.shape[-1]).split(
        [prefix.length, queries], dim=-1
    )
    output = seen @ values + own @ value
    return output.view(rows, heads, queries, -1).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_attention)


def grouped(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let ``model`` compute with `grouped_attention`; its forward pass takes ``prefix``, too."""
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
