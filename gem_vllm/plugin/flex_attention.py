"""The GEM mask on vLLM's FlexAttention: slower than `gem_vllm.plugin.flash_attention`, and obvious.

A row sees an interval of columns and itself, which is said as such to FlexAttention's kernel. Where
FlashAttention parts sequences and merges results, here is one call, so that each checks the other.
On CUDA ``--attention-backend FLEX_ATTENTION`` takes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from vllm.config import VllmConfig
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flex_attention import (
    FlexAttentionBackend,
    FlexAttentionMetadata,
    FlexAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from gem_vllm.plugin.step import GemStep, IntArray, current

# Behind every position: where an ordinary row's interval ends is where it stands.
_END = np.iinfo(np.int32).max


@dataclass(frozen=True)
class SeenRows:
    """What each row of a step sees of its sequence: an interval of positions, and itself.

    Attributes:
        start: int64 [tokens]: first position.
        end: int64 [tokens]: behind the last, for special tokens; more than any for other rows,
            which end where they stand.
        behind: how many positions a special token may stand behind the end of its interval.
    """

    start: IntArray
    end: IntArray
    behind: int

    @staticmethod
    def of_step(step: GemStep, num_tokens: int, block_size: int) -> SeenRows:
        """Those of all rows of a step.

        Args:
            step: its special tokens.
            num_tokens: computed in the step.
            block_size: of the KV cache; there is less padding than that before a run.
        """
        start = np.zeros(num_tokens, dtype=np.int64)
        if step.segments is not None:
            start = np.repeat(step.segments.start, step.segments.num_rows)
        end = np.full(num_tokens, _END, dtype=np.int64)
        start[step.rows_np], end[step.rows_np] = step.seen_from, step.seen_to
        return SeenRows(start, end, block_size + int(step.special_index.max(initial=0)))


def sees(start: Tensor, end: Tensor, row: Tensor, column: Tensor, window: int | None) -> Tensor:
    """Whether a row sees a column of its sequence (`gem_vllm.mask`).

    Args:
        start, end: of the row's interval, as in `SeenRows`.
        row: where it stands.
        column: a position.
        window: W, for layers whose rows see W tokens; None for all.

    Returns:
        bool, of the shape that the arguments broadcast to.
    """
    end = torch.minimum(end, row)
    if window is not None:
        start = torch.maximum(start, end - window + 1)
    return ((column >= start) & (column < end)) | (column == row)


@dataclass
class GemFlexAttentionMetadata(FlexAttentionMetadata):
    """vLLM's metadata of a step with special tokens, or with rows behind them.

    Attributes:
        sliding_window: of the layer that the masks are for, which sets it.
        row_start, row_end: int64 [tokens], as in `SeenRows`.
        behind: as in `SeenRows`.
    """

    sliding_window: int | None = None
    row_start: Tensor | None = None
    row_end: Tensor | None = None
    behind: int = 0

    def get_mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The whole mask, of a layer with this `sliding_window`."""
        assert self.row_start is not None
        assert self.row_end is not None
        assert self.doc_ids is not None
        row_start, row_end, doc_ids = self.row_start, self.row_end, self.doc_ids
        window = self.sliding_window

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, physical_kv_idx: Tensor) -> Tensor:
            is_valid, row, column = self._convert_physical_to_logical(
                doc_ids, q_idx, physical_kv_idx
            )
            return is_valid & sees(row_start[q_idx], row_end[q_idx], row, column, window)

        return mask_mod

    def _build_block_mask_direct(self) -> BlockMask:
        """vLLM's, which leaves out what is before the window of where a row stands."""
        window = self.sliding_window
        if window is not None:
            self.sliding_window = window + self.behind
        try:
            return super()._build_block_mask_direct()
        finally:
            self.sliding_window = window


class GemFlexAttentionMetadataBuilder(FlexAttentionMetadataBuilder):
    """Brings the GEM mask into the metadata of steps that it concerns."""

    # As `GemFlashAttentionMetadataBuilder`.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    supports_update_block_table = False

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        if isinstance(kv_cache_spec, SlidingWindowSpec):
            # The runner's is longer, of blocks to keep (`runner_mixin`). By this one vLLM makes the
            # masks of captured graphs, which a layer of another window would make again in them.
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            kv_cache_spec = replace(kv_cache_spec, sliding_window=layer.sliding_window)
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlexAttentionMetadata:
        """vLLM's metadata; its mask of blocks is made by the first layer, of its window."""
        causal = super().build(common_prefix_len, common_attn_metadata, fast_build)
        step = current()
        if step is None:
            return causal
        num_tokens = int(common_attn_metadata.query_start_loc_cpu[-1])
        seen = SeenRows.of_step(step, num_tokens, self.block_size)
        copied = {field.name: getattr(causal, field.name) for field in fields(causal)}
        return GemFlexAttentionMetadata(
            **{**copied, "block_mask": None},
            row_start=async_tensor_h2d(seen.start, self.device),
            row_end=async_tensor_h2d(seen.end, self.device),
            behind=seen.behind,
        )


class GemFlexAttentionBackend(FlexAttentionBackend):
    """`FLEX_ATTENTION` with the GEM mask."""

    @staticmethod
    def get_builder_cls() -> type[GemFlexAttentionMetadataBuilder]:
        return GemFlexAttentionMetadataBuilder
