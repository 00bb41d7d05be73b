"""The pooling head: hidden states of requests' special tokens to their embeddings."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from gem_vllm.config import GemConfig


def pool_special_tokens(
    hidden_states: torch.Tensor,
    gem_config: GemConfig,
    *,
    dimensions: int | None = None,
    use_activation: bool | None = None,
) -> torch.Tensor:
    """Pool, cut to `dimensions`, L2-normalise (in this order, in float32).

    Args:
        hidden_states: [..., k, hidden], after the model's final norm, in the order of the special
            ids.
        gem_config: says whether the k states are averaged or concatenated.
        dimensions: keep the leading values only (Matryoshka); None keeps all.
        use_activation: False leaves out the normalisation; None is vLLM's default, True.

    Returns:
        float32 [..., embedding size].
    """
    pooled = hidden_states.float()
    pooled = pooled.mean(dim=-2) if gem_config.pooling == "mean" else pooled.flatten(-2)
    if dimensions is not None:
        pooled = pooled[..., :dimensions]
    return pooled if use_activation is False else normalize(pooled, dim=-1)
