"""The GEM mask in vLLM's paged attention: what the backends have in common.

Behind a run a row sees the run and what follows it. A run inside a prompt starts a KV block
(`gem_vllm.plugin.runs`), so such rows are a sequence of their own for the causal kernel, whose
block table starts with that block (`in_segments`).

A special token sees its sequence's text and itself, not the special tokens before it, nor padding.
With k = 1 and no padding the causal kernel is exact. Else it is exact for every row but the special
ones, which each backend computes again after it: `gem_vllm.plugin.cpu_attention`,
`gem_vllm.plugin.flash_attention`.

Cost: that of the special rows, for steps that have any with k > 1 or padding; a copy of the block
table for rows behind a run, which attend to the less; nothing else.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from gem_vllm.plugin.step import GemStep, Segments, current

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


def register_attention() -> None:
    """Put the GEM backend in the place of the one that it extends on this platform.

    On a CPU there is but one; on CUDA `GemModelConfig` sees to it that one of these is taken.
    """
    if current_platform.is_cpu():
        registry.register_backend(
            AttentionBackendEnum.CPU_ATTN, "gem_vllm.plugin.cpu_attention.GemCPUAttentionBackend"
        )
    else:
        registry.register_backend(
            AttentionBackendEnum.FLASH_ATTN,
            "gem_vllm.plugin.flash_attention.GemFlashAttentionBackend",
        )
        registry.register_backend(
            AttentionBackendEnum.FLEX_ATTENTION,
            "gem_vllm.plugin.flex_attention.GemFlexAttentionBackend",
        )


class MaskedMetadataBuilder(_Base):
    """Mixin before one of vLLM's metadata builders.

    Attributes:
        metadata_class: vLLM's metadata with a field `special`, None where the causal kernel alone
            is exact.
    """

    metadata_class: type

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """vLLM's, with sequences parted where a run ends, and the second call planned."""
        step, block_table = current(), common_attn_metadata.block_table_tensor
        if step is not None and step.segments is not None:
            common_attn_metadata = in_segments(common_attn_metadata, step.segments, self.block_size)
            # FlashAttention's plan ahead, which it leaves out, has room for a row a request.
            fast_build = True
        causal = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = self.metadata_class(
            **{field.name: getattr(causal, field.name) for field in fields(causal)}
        )
        if step is not None and step.needs_mask.any():
            metadata.special = self.plan_special_rows(step, block_table)
        return metadata

    def plan_special_rows(self, step: GemStep, block_table: torch.Tensor) -> Any:
        """What `MaskedAttention.attend_special_rows` is given in each layer.

        Args:
            step: with rows that need the mask.
            block_table: int32 [requests, blocks] of this layer group.
        """
        raise NotImplementedError


class MaskedAttention(_Base):
    """Mixin before one of vLLM's attention implementations."""

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """vLLM's causal kernel, then the special rows once more. For shapes see there."""
        super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        special = getattr(attn_metadata, "special", None)
        if special is not None:
            self.attend_special_rows(layer, query, key, value, kv_cache, special, output)
        return output

    def attend_special_rows(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        special: Any,
        output: torch.Tensor,
    ) -> None:
        """Put into `output` what the rows in `special` see: their text and themselves."""
        raise NotImplementedError


def in_segments(
    metadata: CommonAttentionMetadata, segments: Segments, block_size: int
) -> CommonAttentionMetadata:
    """The metadata of a step with a sequence for each segment in the place of each request.

    Args:
        metadata: of the step, a sequence a request.
        segments: of the step.
        block_size: of this layer group.
    """
    device = metadata.block_table_tensor.device
    request_index = async_tensor_h2d(segments.request_index, device)
    # By how much each is shorter than its request. How long that is only the device knows, as long
    # as speculated tokens may have been rejected; what is known here is the most that it can be.
    request_end = np.zeros(metadata.num_reqs, dtype=np.int64)
    np.maximum.at(request_end, segments.request_index, segments.end)
    shorter = request_end[segments.request_index] - segments.end + segments.start
    max_seq_len = int((segments.end - segments.start).max())
    query_start_loc = np.zeros(len(segments.num_rows) + 1, dtype=np.int32)
    np.cumsum(segments.num_rows, out=query_start_loc[1:])
    return replace(
        metadata,
        query_start_loc=async_tensor_h2d(query_start_loc, device),
        query_start_loc_cpu=torch.from_numpy(query_start_loc),
        seq_lens=metadata.seq_lens[request_index]
        - async_tensor_h2d(shorter.astype(np.int32), device),
        num_reqs=len(segments.start),
        max_query_len=int(segments.num_rows.max()),
        max_seq_len=max_seq_len,
        block_table_tensor=block_tables_from(
            metadata.block_table_tensor,
            request_index,
            async_tensor_h2d(segments.start // block_size, device),
            cdiv(max_seq_len, block_size),
        ),
    )


def block_tables_from(
    block_table: torch.Tensor,
    request_index: torch.Tensor,
    first_block: torch.Tensor,
    num_blocks: int,
) -> torch.Tensor:
    """Block tables that start later, one for each of n sequences.

    Args:
        block_table: int32 [requests, blocks].
        request_index: int64 [n], on the same device: the request that each sequence is of.
        first_block: int64 [n], on the same device: where each starts, within its request.
        num_blocks: of the longest of them.

    Returns:
        int32 [n, num_blocks]; behind a sequence's last block there is anything.
    """
    columns = first_block[:, None] + torch.arange(num_blocks, device=block_table.device)
    return block_table[request_index[:, None], columns.clamp(max=block_table.shape[1] - 1)]
