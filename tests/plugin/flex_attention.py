"""FlexAttention's kernel in plain torch, so that vLLM's backend of that name runs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from vllm.v1.attention.backends.flex_attention import FlexAttentionImpl

from gem_vllm.plugin.flex_attention import GemFlexAttentionBackend
from tests.plugin.flash_attention import reshape_and_cache_flash


class FlexImplOnCPU(FlexAttentionImpl):
    """All but the kernel that writes keys and values."""

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        caches = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        reshape_and_cache_flash(key, value, *caches, slot_mapping)


class FlexAttentionOnCPU(GemFlexAttentionBackend):
    """Goes by the name of the one backend that vLLM's CPU platform takes."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[FlexImplOnCPU]:
        return FlexImplOnCPU


def flex_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: None,
    block_mask: BlockMask,
    scale: float,
    *,
    enable_gqa: bool,
    kernel_options: dict[str, Any],
    return_aux: None,
) -> torch.Tensor:
    """Attention that looks, as the kernel does, into the blocks of `block_mask` only.

    Args:
        q: [1, heads, rows, d].
        k, v: [1, kv_heads, columns, d].
        block_mask: of [rows, columns].

    Returns:
        [1, heads, rows, d].
    """
    assert score_mod is None
    assert return_aux is None
    rows, columns = q.shape[2], k.shape[2]
    q_block, kv_block = block_mask.BLOCK_SIZE
    listed = torch.zeros(rows, columns, dtype=torch.bool)
    for i, count in enumerate(block_mask.kv_num_blocks[0, 0].tolist()):
        for block in block_mask.kv_indices[0, 0, i, :count].tolist():
            part = slice(i * q_block, (i + 1) * q_block), slice(block * kv_block, None)
            listed[part][:, :kv_block] = True
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    zero = torch.zeros((), dtype=torch.int64)
    seen = listed & block_mask.mask_mod(zero, zero, row, column)
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    # A row of padding may see nothing.
    return scores.softmax(-1).nan_to_num(0.0) @ value
