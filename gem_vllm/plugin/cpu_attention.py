"""The GEM mask on vLLM's CPU attention; `gem_vllm.plugin.attention` says what is computed.

Special rows are computed again after the causal kernel: each special token becomes a sequence of
its own, of one query token, over scratch KV blocks that hold the text (copied) and, right behind
the text, the token's own key and value. Blocks are copied whole and read by the same kernel, so
nothing here depends on the layout that the kernel uses inside a block.

Cost: k queries for each run, and a copy of its text's blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.attention import MaskedAttention, MaskedMetadataBuilder


@dataclass
class SpecialRows:
    """The special tokens of one step as sequences over scratch blocks.

    Attributes:
        rows: int64 [n]: rows of the special tokens among the step's tokens.
        source_blocks: int64 [b]: KV block that each scratch block is a copy of.
        block_table: int32 [n, blocks]: scratch blocks of each special token's sequence.
        slot_mapping: int64 [n]: scratch slot of each special token's own key and value.
        seq_lens: int32 [n]: text length + 1.
        query_start_loc: int32 [n + 1]: 0, 1, …, n.
        scheduler_metadata: the CPU kernel's plan for these n sequences.
    """

    rows: torch.Tensor
    source_blocks: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    scheduler_metadata: torch.Tensor


@dataclass
class GemCPUAttentionMetadata(CPUAttentionMetadata):
    """vLLM's metadata; `special` is None where the causal kernel alone is exact."""

    special: SpecialRows | None = None


class GemCPUAttentionMetadataBuilder(MaskedMetadataBuilder, CPUAttentionMetadataBuilder):
    """Plans the second call for steps with runs of more than one special token."""

    metadata_class = GemCPUAttentionMetadata

    def plan_special_rows(self, step: gem_step.GemStep, block_table: torch.Tensor) -> SpecialRows:
        """Lay out the scratch blocks: each text's full blocks once, the last one per row.

        Args:
            step: this step's special tokens.
            block_table: int32 [requests, blocks] of this layer group.
        """
        size = self.block_size
        chosen = step.needs_mask.nonzero()[0].tolist()
        sources: list[torch.Tensor] = []
        tables: list[list[int]] = []
        slots: list[int] = []
        text_blocks: dict[tuple[int, int], list[int]] = {}
        count = 0
        for i in chosen:
            request, first = int(step.request_index[i]), int(step.seen_from[i]) // size
            full, offset = divmod(int(step.seen_to[i]) - first * size, size)
            text = (request, first)
            if text not in text_blocks:
                text_blocks[text] = list(range(count, count + full))
                sources.append(block_table[request, first : first + full])
                count += full
            sources.append(block_table[request, first + full : first + full + 1])
            tables.append([*text_blocks[text], count])
            slots.append(count * size + offset)
            count += 1
        width = max(map(len, tables))
        seq_lens = torch.from_numpy(step.seen_to - step.seen_from + 1)[chosen].int()
        query_start_loc = torch.arange(len(chosen) + 1, dtype=torch.int32)
        return SpecialRows(
            rows=step.rows[chosen],
            source_blocks=torch.cat(sources).long(),
            block_table=torch.tensor(
                [table + [0] * (width - len(table)) for table in tables], dtype=torch.int32
            ),
            slot_mapping=torch.tensor(slots, dtype=torch.int64),
            seq_lens=seq_lens,
            query_start_loc=query_start_loc,
            scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
                num_reqs=len(chosen),
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                seq_lens=seq_lens,
                dtype=self.dtype,
                query_start_loc=query_start_loc,
                causal=True,
                sliding_window_size=self.window_size,
                isa=self.isa,
                enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
                kv_cache_dtype=self.kv_cache_dtype,
            ),
        )


class GemCPUAttentionImpl(MaskedAttention, CPUAttentionBackendImpl):
    """The causal kernel, then the special rows once more over their scratch blocks."""

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
        scratch = kv_cache[special.source_blocks]
        blocks, kv_heads, block_size, _ = scratch.shape
        key_cache, value_cache = scratch.view(blocks, kv_heads, block_size * 2, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key[special.rows],
            value[special.rows],
            key_cache,
            value_cache,
            special.slot_mapping,
            layer.isa,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        attended = torch.empty_like(output[special.rows])
        ops.cpu_attention_with_kv_cache(
            query=query[special.rows],
            key_cache=key_cache,
            value_cache=value_cache,
            output=attended,
            query_start_loc=special.query_start_loc,
            seq_lens=special.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=self.alibi_slopes,
            sliding_window=self.sliding_window,
            block_table=special.block_table,
            softcap=self.logits_soft_cap,
            scheduler_metadata=special.scheduler_metadata,
            s_aux=self.sinks,
            k_scale=layer._k_scale_float,
            v_scale=layer._v_scale_float,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        output[special.rows] = attended


class GemCPUAttentionBackend(CPUAttentionBackend):
    """`CPU_ATTN` with the GEM mask."""

    @staticmethod
    def get_impl_cls() -> type[GemCPUAttentionImpl]:
        return GemCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[GemCPUAttentionMetadataBuilder]:
        return GemCPUAttentionMetadataBuilder
