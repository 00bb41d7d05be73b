"""FlashAttention's functions in plain torch, so that vLLM's backend of that name runs on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from gem_vllm.plugin.flash_attention import GemFlashAttentionBackend


class FlashAttentionOnCPU(GemFlashAttentionBackend):
    """Goes by the name of the one backend that vLLM's CPU platform takes."""

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"


def flash_attn_varlen_func(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None,
    softcap: float,
    out: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
    **unused: Any,
) -> Any:
    """Paged attention, a sequence and a query at a time.

    Args:
        q: [tokens, heads, d].
        k, v: [blocks, block_size, kv_heads, d].
        cu_seqlens_q: int32 [n + 1].
        seqused_k: int32 [n]: keys of each sequence; its last query stands at the last of them.
        block_table: int32 [n, blocks].
        window_size: how far a query sees to the left and to the right; -1 for all.

    Returns:
        [tokens, heads, d], with `return_softmax_lse` also float32 [heads, tokens].
    """
    assert causal
    for name in ("alibi_slopes", "s_aux", "mask_mod", "dynamic_causal"):
        assert unused.get(name) is None, name
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[1], len(q))
    left = -1 if window_size is None else window_size[0]
    lengths = cu_seqlens_q.diff()
    assert lengths.max() <= max_seqlen_q
    assert seqused_k.max() <= max_seqlen_k
    for i, (rows, keys) in enumerate(zip(lengths.tolist(), seqused_k.tolist(), strict=True)):
        blocks = block_table[i, : -(-keys // k.shape[1])].long()
        group = q.shape[1] // k.shape[2]
        key, value = (
            cache[blocks].flatten(0, 1)[:keys].float().repeat_interleave(group, dim=1)
            for cache in (k, v)
        )
        for row in range(rows):
            token = int(cu_seqlens_q[i]) + row
            position = keys - rows + row
            first = max(position - left, 0) if left >= 0 else 0
            seen = slice(first, position + 1)
            scores = torch.einsum("hd,nhd->hn", q[token].float(), key[seen]) * softmax_scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            lse[:, token] = scores.logsumexp(-1)
            out[token] = torch.einsum("hn,nhd->hd", scores.softmax(-1), value[seen]).to(out.dtype)
    return (out, lse) if return_softmax_lse else out


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *unused: Any,
) -> None:
    """Put keys and values [tokens, kv_heads, d] into caches [blocks, block_size, kv_heads, d]."""
    tokens = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[tokens]
    block, offset = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[block, offset] = key[tokens]
    value_cache[block, offset] = value[tokens]
