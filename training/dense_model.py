"""Modes ``full`` and ``lora``: the paper's form, one forward pass under the dense GEM mask.

Trained weights act at every position, so there is nothing to be shared or left out.
"""

from __future__ import annotations

import torch

from gem_vllm.mask import gem_mask
from gem_vllm.training.masks import layer_masks
from gem_vllm.training.model import GemTrainingModel


class DenseModel(GemTrainingModel):
    """All weights (``full``) or an ordinary LoRA and the special rows (``lora``) are trained."""

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
        base = self.base
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        real = position < lengths[:, None]

        def visible(window: int | None) -> torch.Tensor:
            mask = gem_mask(token_ids, self.special_ids, attention_mask=real, sliding_window=window)
            if seen is None:
                return mask
            special = torch.isin(token_ids, torch.tensor(self.special_ids).to(token_ids))
            itself = position == position[:, None]
            return mask & (~special[:, :, None] | seen[:, None] | itself)

        masks = layer_masks(self.config, base.dtype, visible)
        output = base.get_decoder()(
            input_ids=token_ids,
            attention_mask=masks,
            position_ids=position.expand_as(token_ids),
            use_cache=False,
        )
        return output.last_hidden_state
