"""The embedding that an LLM gives as it is: the mean of its last hidden states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gem_vllm.checkpoint import load_base
from gem_vllm.machine import has_cuda

# Padded tokens of a forward pass.
PASS_TOKENS = 8192


class MeanEmbedder:
    """The base as it is: the mean of its last hidden states over a text's tokens, in float32.

    Args:
        base: folder of the base model.
        max_length: tokens of a text at most; it is cut at its end.

    Attributes:
        tokens: that have been embedded, without padding.
    """

    def __init__(self, base: Path, max_length: int) -> None:
        model, self._tokenizer = load_base(base, dtype=torch.float32)
        self._tokenizer.truncation_side = "right"
        self._device = torch.device("cuda" if has_cuda() else "cpu")
        self._decoder = model.get_decoder().to(self._device)
        self._max_length = max_length
        self.tokens = 0

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> np.ndarray:
        """float32 [n, hidden] for n texts, which run in passes of like length."""
        encoded = self._tokenizer(texts, truncation=True, max_length=self._max_length)
        ids = [torch.tensor(row) for row in encoded["input_ids"]]
        self.tokens += sum(map(len, ids))
        vectors: dict[int, np.ndarray] = {}
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        while order:
            longest = len(ids[order[-1]])
            rows = [order.pop() for _ in range(min(len(order), max(1, PASS_TOKENS // longest)))]
            padded = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True)
            # Behind each text, where no token of it looks: causal attention needs no mask.
            hidden = self._decoder(padded.to(self._device)).last_hidden_state
            for row, states in zip(rows, hidden, strict=True):
                vectors[row] = states[: len(ids[row])].mean(dim=0).cpu().numpy()
        return np.stack([vectors[row] for row in range(len(ids))])
