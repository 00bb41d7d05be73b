"""Modes ``full`` and ``lora``: the paper's form, one forward pass under the dense GEM mask.

Trained weights act at every position, so there is nothing to be shared or left out.
"""

from __future__ import annotations

from typing import Any

import torch

from gem_vllm.mask import gem_intervals, gem_mask, interval_mask
from gem_vllm.training.attention import flex_attention
from gem_vllm.training.masks import FLEX_BLOCK, block_masks, layer_masks
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.packing import Packing


class DenseModel(GemTrainingModel):
    """All weights (``full``) or an ordinary LoRA and the special rows (``lora``) are trained.

    ``pack_into``: short rows are packed; None: each is padded to the longest. On CUDA they are
    packed into rows of so many tokens, which attend by FlexAttention; elsewhere into rows as wide
    as is cheapest, which attend by SDPA under a dense mask.
    """

    pack_into: int | None = None

    def special_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        k = len(self.special_ids)
        extended = torch.nn.functional.pad(token_ids, (0, k))
        columns = lengths[:, None] + torch.arange(k, device=lengths.device)
        extended.scatter_(
            1, columns, torch.tensor(self.special_ids).to(extended).expand_as(columns)
        )
        if seen is not None:
            seen = torch.nn.functional.pad(seen, (0, k), value=True)
        hidden = self._hidden(extended, lengths + k, seen)
        return hidden[torch.arange(len(lengths), device=lengths.device)[:, None], columns]

    def ordinary_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, predicting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All of them: trained parameters act at every position."""
        return self._hidden(token_ids, lengths)[predicting], predicting

    def _hidden(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states [N, T, hidden] of right-padded rows.

        seen: bool [N, T], what special tokens see of them at most; None for all.
        """
        if self.pack_into is not None and seen is None:
            return self._packed_hidden(token_ids, lengths, self.pack_into)
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        real = position < lengths[:, None]

        def visible(window: int | None) -> torch.Tensor:
            mask = gem_mask(token_ids, self.special_ids, attention_mask=real, sliding_window=window)
            if seen is None:
                return mask
            special = torch.isin(token_ids, torch.tensor(self.special_ids).to(token_ids))
            itself = position == position[:, None]
            return mask & (~special[:, :, None] | seen[:, None] | itself)

        masks = layer_masks(self.config, self.base.dtype, visible)
        return self._decode(token_ids, position.expand_as(token_ids), masks)

    def _packed_hidden(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, width: int
    ) -> torch.Tensor:
        """The same of rows that are packed; ``width``: as ``pack_into``, or of the longest one."""
        flex = self._flex(token_ids)
        if flex:
            packing = Packing.of(lengths, max(width, int(lengths.max())), multiple_of=FLEX_BLOCK)
        else:
            packing = Packing.for_dense_masks(lengths)
        position = torch.arange(token_ids.shape[1], device=token_ids.device).expand_as(token_ids)

        def intervals(window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
            # Each row's own, moved to where the row lies; an empty cell sees itself alone.
            bounds = gem_intervals(token_ids, self.special_ids, sliding_window=window)
            start, end = (packing.pack(bound + packing.offset[:, None]) for bound in bounds)
            return start, end

        packed, positions = packing.pack(token_ids), packing.pack(position)
        if flex:
            masks = block_masks(self.config, packed, intervals)
            with flex_attention(self.base):
                hidden = self._decode(packed, positions, masks)
        else:
            masks = layer_masks(
                self.config, self.base.dtype, lambda window: interval_mask(*intervals(window))
            )
            hidden = self._decode(packed, positions, masks)
        return packing.unpack(hidden, token_ids.shape[1])

    def _flex(self, token_ids: torch.Tensor) -> bool:
        # FlexAttention has no dropout.
        dropout = self.training and getattr(self.config, "attention_dropout", 0.0)
        eager = self.base.config._attn_implementation == "eager"
        return token_ids.is_cuda and not eager and not dropout

    def _decode(self, token_ids: torch.Tensor, positions: torch.Tensor, masks: Any) -> torch.Tensor:
        output = self.base.get_decoder()(
            input_ids=token_ids, attention_mask=masks, position_ids=positions, use_cache=False
        )
        return output.last_hidden_state
