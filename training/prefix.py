"""A prefix's forward pass, of which nothing is wanted but every layer's keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache


class Prefix:
    """Keys and values of texts that a decoder computes some of at a time.

    Attributes:
        length: T, the texts' positions.
        keys: [layers, N, heads, T, head_dim]; behind each text finite, and for nobody to see.
        values: as ``keys``.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layers: int, texts: int, length: int) -> None:
        self._layers, self._texts, self.length = layers, texts, length

    def put(self, layer: int, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take up a layer's keys and values [n, heads, t, head_dim] of ``rows``, int64 [n]."""
        if not hasattr(self, "keys"):
            _, heads, _, head_dim = keys.shape
            shape = (self._layers, self._texts, heads, self.length, head_dim)
            self.keys, self.values = keys.new_zeros(shape), values.new_zeros(shape)
        self.keys[layer, rows, :, : keys.shape[2]] = keys
        self.values[layer, rows, :, : keys.shape[2]] = values


class SomeRows(DynamicCache):
    """Cache of a forward pass over some of the texts, which fills their rows in ``prefix``.

    The pass begins at the texts' first tokens, so that what it writes is all there is to read: no
    layer's keys and values are joined with earlier ones, nor kept twice.
    """

    def __init__(self, prefix: Prefix, rows: torch.Tensor) -> None:
        super().__init__()
        self.prefix, self.rows = prefix, rows

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's keys and values [n, heads, t, head_dim], and give them to be read."""
        self.prefix.put(layer_idx, self.rows, key_states, value_states)
        return key_states, value_states


@contextmanager
def last_mlp_left_out(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder give its last layer's keys and values without the MLP behind them."""
    layer: Any = decoder.layers[-1]
    mlp = layer.mlp
    layer.mlp = nn.Identity()
    try:
        yield
    finally:
        layer.mlp = mlp
