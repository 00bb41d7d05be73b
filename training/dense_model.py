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

    def special_states(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        k = len(self.special_ids)
        extended = torch.nn.functional.pad(token_ids, (0, k))
        columns = lengths[:, None] + torch.arange(k, device=lengths.device)
        extended.scatter_(
            1, columns, torch.tensor(self.special_ids).to(extended).expand_as(columns)
        )
        hidden = self._hidden(extended, lengths + k)
        return hidden[torch.arange(len(lengths), device=lengths.device)[:, None], columns]

    def ordinary_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, predicting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All of them: trained parameters act at every position."""
        return self._hidden(token_ids, lengths)[predicting], predicting

    def _hidden(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Last hidden states [N, T, hidden] of right-padded rows."""
        base = self.base
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        real = position < lengths[:, None]
        masks = layer_masks(
            self.config,
            base.dtype,
            lambda window: gem_mask(
                token_ids, self.special_ids, attention_mask=real, sliding_window=window
            ),
        )
        output = base.get_decoder()(
            input_ids=token_ids,
            attention_mask=masks,
            position_ids=position.expand_as(token_ids),
            use_cache=False,
        )
        return output.last_hidden_state
