"""The GEM mask on vLLM's FlashAttention (CUDA); `gem_vllm.plugin.attention` says what is computed.

Special rows are computed again after the causal call. Each special token is a sequence of one query
over the KV blocks of its text, where they are; the kernel's log-sum-exp then tells how much its own
key and value, which it sees beside the text, weigh against that.

Cost: k queries for each run, and the arithmetic of k single keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d, canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)

from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.attention import MaskedAttention, MaskedMetadataBuilder, block_tables_from


@dataclass
class SpecialRows:
    """The special tokens of one step as sequences of one query each over their texts' KV blocks.

    Attributes:
        rows: int64 [n]: rows of the special tokens among the step's tokens.
        block_table: int32 [n, blocks]: from the block that each one's text starts with.
        text_lens: int32 [n]: tokens of that text, 1 or more.
        max_text_len: the largest of them.
        query_start_loc: int32 [n + 1]: 0, 1, …, n.
    """

    rows: torch.Tensor
    block_table: torch.Tensor
    text_lens: torch.Tensor
    max_text_len: int
    query_start_loc: torch.Tensor

    @staticmethod
    def of_step(step: gem_step.GemStep, block_table: torch.Tensor, block_size: int) -> SpecialRows:
        """Those of a step that a causal kernel would show too much.

        Args:
            step: this step's special tokens.
            block_table: int32 [requests, blocks] of this layer group.
            block_size: of this layer group.
        """
        device = block_table.device
        chosen = step.needs_mask.nonzero()[0]
        seen_from, text_lens = step.seen_from[chosen], (step.seen_to - step.seen_from)[chosen]
        max_text_len = int(text_lens.max())
        return SpecialRows(
            rows=async_tensor_h2d(step.rows_np[chosen], device),
            block_table=block_tables_from(
                block_table,
                async_tensor_h2d(step.request_index[chosen], device),
                async_tensor_h2d(seen_from // block_size, device),
                cdiv(max_text_len, block_size),
            ),
            text_lens=async_tensor_h2d(text_lens.astype(np.int32), device),
            max_text_len=max_text_len,
            query_start_loc=torch.arange(len(chosen) + 1, dtype=torch.int32, device=device),
        )


def with_own_key(
    attended: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
) -> torch.Tensor:
    """What each query attends to when its own key is among those that it has attended to.

    Args:
        attended: [n, heads, d]: the result over the other keys.
        lse: [heads, n]: the log-sum-exp of their scores; -inf where there are none.
        query: [n, heads, d].
        key, value: [n, kv_heads, d], each query's own.
        scale: of the scores.
        softcap: of the scores, 0 for none.

    Returns:
        [n, heads, d], computed in float32, in the dtype of `attended`.
    """
    group = query.shape[1] // key.shape[1]
    own_key, own_value = (x.float().repeat_interleave(group, dim=1) for x in (key, value))
    score = (query.float() * own_key).sum(-1) * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    weight = torch.sigmoid(score - lse.float().transpose(0, 1)).unsqueeze(-1)
    return torch.lerp(attended.float(), own_value, weight).to(attended.dtype)


@dataclass
class GemFlashAttentionMetadata(FlashAttentionMetadata):
    """vLLM's metadata; `special` is None where the causal kernel alone is exact."""

    special: SpecialRows | None = None


class GemFlashAttentionMetadataBuilder(MaskedMetadataBuilder, FlashAttentionMetadataBuilder):
    """Plans the second call for steps with special tokens that need it."""

    metadata_class = GemFlashAttentionMetadata
    aot_sliding_window: tuple[int, int] | None  # of vLLM's builder
    # Whole steps are captured of decoding only; others are parted into sequences, or call twice.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # Another layer group's tables cannot be put into segments and special rows.
    supports_update_block_table = False

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """The mixin's.

        The first plan ahead finds out whether all layers have one window. A step that goes without
        such a plan takes the place of none.
        """
        is_planned, step = self.aot_sliding_window is not None, gem_step.current()
        metadata = super().build(*args, **kwargs)
        if not is_planned and step is not None and step.segments is not None:
            self.aot_sliding_window = None
        return metadata

    def plan_special_rows(self, step: gem_step.GemStep, block_table: torch.Tensor) -> SpecialRows:
        return SpecialRows.of_step(step, block_table, self.block_size)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: rows behind a run do not see the prefix that a batch shares (vLLM 0.31)."""
        return False


class GemFlashAttentionImpl(MaskedAttention, FlashAttentionImpl):
    """The causal kernel, then the special rows once more over their texts' own blocks."""

    def attend_special_rows(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        special: SpecialRows,
        output: torch.Tensor,
    ) -> None:
        key_cache, value_cache = (
            canonicalize_singleton_dim_strides(cache)
            for cache in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        rows, own_query = special.rows, query[special.rows]
        window = self.sliding_window[0]
        attended, lse = flash_attn.flash_attn_varlen_func(
            q=own_query,
            k=key_cache,
            v=value_cache,
            cu_seqlens_q=special.query_start_loc,
            max_seqlen_q=1,
            seqused_k=special.text_lens,
            max_seqlen_k=special.max_text_len,
            softmax_scale=self.scale,
            causal=True,
            # To the kernel the query is the text's last token, and it stands one behind.
            window_size=[window - 1, 0] if window >= 0 else [-1, -1],
            block_table=special.block_table,
            softcap=self.logits_soft_cap,
            return_softmax_lse=True,
            # FlashAttention 4's kernel for heads of 256 wants texts that fill their blocks.
            fa_version=2 if self.fa4_hd256 else self.vllm_flash_attn_version,
        )
        output[rows] = with_own_key(
            attended,
            lse,
            own_query,
            key[rows],
            value[rows],
            scale=self.scale,
            softcap=self.logits_soft_cap,
        )


class GemFlashAttentionBackend(FlashAttentionBackend):
    """`FLASH_ATTN` with the GEM mask."""

    @staticmethod
    def get_impl_cls() -> type[GemFlashAttentionImpl]:
        return GemFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[GemFlashAttentionMetadataBuilder]:
        return GemFlashAttentionMetadataBuilder
