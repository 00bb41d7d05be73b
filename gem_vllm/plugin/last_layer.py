"""The last layer's MLP for the rows that are read, and for no others.

What is read of the last layer's result are the rows that a token is sampled from and the special
tokens' rows: of a text of m tokens one row, or k. The rows of the other tokens end with their keys
and values, which the attention before this MLP has written. Saved is the MLP's share of one layer
in every prefill, of both kinds of request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d, direct_register_custom_op

from gem_vllm.plugin import step as gem_step

NAME = "gem_last_mlp"


@dataclass(frozen=True)
class ReadRows:
    """Rows of a step that are read of the last layer.

    Attributes:
        rows: int64 [n], on the model's device: among the step's tokens.
        special: int64 [m], on the model's device: which of the n are special tokens.
    """

    rows: torch.Tensor
    special: torch.Tensor

    @staticmethod
    def of_step(
        step: gem_step.GemStep | None, sampled: gem_step.IntArray, device: torch.device
    ) -> ReadRows:
        """Those of embeddings' special tokens, and those to sample from.

        Args:
            step: the special tokens of the step.
            sampled: int [m]: rows to sample from.
            device: the model's.
        """
        special = np.empty(0, dtype=np.int64) if step is None else step.rows_np
        read = special[: 0 if step is None else step.num_read]
        rows = np.concatenate([read, sampled[~np.isin(sampled, read)]])
        return ReadRows(
            async_tensor_h2d(rows, device),
            async_tensor_h2d(np.isin(rows, special).nonzero()[0], device),
        )


class LastLayerMLP(nn.Module):
    """In the place of the last decoder layer's `mlp`.

    Attributes:
        read_rows: rows whose result is read; None for every row. The runner sets it for each step.
    """

    read_rows: ReadRows | None = None

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`mlp` of x [tokens, hidden]; zero in rows that nobody reads."""
        if torch.compiler.is_compiling():
            # Left out of the graph: the rows that are read change their number in every step.
            return torch.ops.vllm.gem_last_mlp(x, NAME)
        return self.of_read_rows(x)

    def of_read_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, run and not traced."""
        read = self.read_rows
        if read is None:
            return self.mlp(x)
        step = gem_step.current()
        if step is not None:
            gem_step.publish(replace(step, rows=read.special))
        try:
            computed = self.mlp(x[read.rows])
        finally:
            gem_step.publish(step)
        return torch.zeros_like(x).index_copy_(0, read.rows, computed)


def _last_mlp(x: torch.Tensor, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].of_read_rows(x)


def _last_mlp_fake(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="gem_last_mlp", op_func=_last_mlp, fake_impl=_last_mlp_fake)


def wrap_last_mlp(model: Any, vllm_config: VllmConfig) -> LastLayerMLP:
    """Put a `LastLayerMLP` into a vLLM decoder; for a model with its weights loaded."""
    layer = model.model.layers[-1]
    layer.mlp = LastLayerMLP(layer.mlp)
    vllm_config.compilation_config.static_forward_context[NAME] = layer.mlp
    return layer.mlp
