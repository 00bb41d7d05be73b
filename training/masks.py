"""Attention masks of a training forward, in the form in which each base takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn.attention.flex_attention import create_block_mask

from gem_vllm.mask import interval_mask_mod

# FlexAttention's, in tokens. Rows that are no whole block may go to its kernel for decoding, which
# has no form for some of them ("NoValidChoicesError": 65 tokens of float32 in torch 2.11).
FLEX_BLOCK = 128
Mask: TypeAlias = torch.Tensor | dict[str, torch.Tensor]


def layer_masks(
    config: Any, dtype: torch.dtype, visible: Callable[[int | None], torch.Tensor]
) -> Mask:
    """Additive masks [N or 1, 1, Q, K] for a decoder's ``attention_mask``.

    config: the base's text config. ``visible(window)`` gives bool [N or 1, Q, K], for full
    attention (None) or a sliding window. A dict by layer type for bases that name their layers'
    types, else one tensor.
    """

    def additive(window: int | None) -> torch.Tensor:
        seen = visible(window).unsqueeze(1)
        hidden = torch.finfo(dtype).min
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, hidden)

    return _by_layer(config, additive)


def block_masks(
    config: Any,
    token_ids: torch.Tensor,
    intervals: Callable[[int | None], tuple[torch.Tensor, torch.Tensor]],
) -> Any:
    """FlexAttention's masks, as `layer_masks` gives dense ones.

    token_ids: [B, L]; ``intervals(window)`` gives start and end, int64 [B, L], as
    `gem_vllm.mask.gem_intervals`.
    """
    rows, length = token_ids.shape

    def block_mask(window: int | None) -> Any:
        mask_mod = interval_mask_mod(*intervals(window))
        device = token_ids.device
        return create_block_mask(
            mask_mod, rows, None, length, length, device=device, BLOCK_SIZE=FLEX_BLOCK
        )

    return _by_layer(config, block_mask)


def _by_layer(config: Any, make: Callable[[int | None], Any]) -> Any:
    """``make(window)``; a dict of them by layer type for bases that name their layers' types."""
    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if not layer_types:
        return make(window)
    return {kind: make(window if kind == "sliding_attention" else None) for kind in layer_types}


def special_mask(
    lengths: torch.Tensor,
    longest: int,
    k: int,
    window: int | None,
    allowed: torch.Tensor | None = None,
) -> torch.Tensor:
    """What special tokens see of [prefix | special]: bool [N, k, longest + k].

    The text's own tokens (within the window that ends where the run starts; of those that are
    ``allowed``, bool [N, longest], where it is given), and itself.
    """
    position = torch.arange(longest, device=lengths.device)
    seen = position < lengths[:, None]
    if window is not None:
        seen &= position > lengths[:, None] - window
    if allowed is not None:
        seen &= allowed
    own = torch.eye(k, dtype=torch.bool, device=lengths.device).expand(len(lengths), -1, -1)
    return torch.cat([seen[:, None].expand(-1, k, -1), own], dim=2)


def suffix_mask(length: int, k: int, window: int | None, *, device: torch.device) -> torch.Tensor:
    """What a suffix sees of [special | suffix]: bool [1, length, k + length], causal."""
    query = torch.arange(length, device=device)[:, None] + k
    key = torch.arange(k + length, device=device)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return seen[None]
