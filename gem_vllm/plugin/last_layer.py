"""The last layer's MLP for the rows that are read, and for no others.

What is read of the last layer's result are the rows that a token is sampled from and the special
tokens' rows: of a text of m tokens one row, or k. The rows of the other tokens end with their keys
and values, which the attention before this MLP has written. Saved is the MLP's share of one layer
in every prefill, of both kinds of request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d, direct_register_custom_op

from gem_vllm.plugin import step as gem_step

NAME = "gem_last_mlp"

if TYPE_CHECKING:
    _MLP = Any
else:
    _MLP = object


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


class LastLayerMLP(_MLP):
    """Mixin over the class of the last decoder layer's `mlp`; `enable` puts it there.

    Attributes:
        read_rows: rows whose result is read; None for every row. The runner sets it for each step.
    """

    read_rows: ReadRows | None = None

    @classmethod
    def enable(cls, mlp: nn.Module) -> None:
        """Let a module, which stays where it is, compute the rows that are read."""
        mlp.__class__ = type(f"Last{type(mlp).__name__}", (cls, type(mlp)), {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The module's own of x [tokens, hidden]; zero in rows that nobody reads."""
        if torch.compiler.is_compiling():
            # Left out of the graph: the rows that are read change their number in every step.
            return torch.ops.vllm.gem_last_mlp(x, NAME)
        return self.of_read_rows(x)

    def of_read_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`forward`, run and not traced."""
        read = self.read_rows
        if read is None:
            return super().forward(x)
        step = gem_step.current()
        if step is not None:
            gem_step.publish(replace(step, rows=read.special))
        try:
            computed = super().forward(x[read.rows])
        finally:
            gem_step.publish(step)
        return torch.zeros_like(x).index_copy_(0, read.rows, computed)


def _last_mlp(x: torch.Tensor, name: str) -> torch.Tensor:
    return get_forward_context().no_compile_layers[name].of_read_rows(x)


def _last_mlp_fake(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


direct_register_custom_op(op_name="gem_last_mlp", op_func=_last_mlp, fake_impl=_last_mlp_fake)


def wrap_last_mlp(model: Any, vllm_config: VllmConfig) -> LastLayerMLP:
    """Make the last MLP of a vLLM decoder, with its weights loaded, a `LastLayerMLP`."""
    mlp = model.model.layers[-1].mlp
    LastLayerMLP.enable(mlp)
    vllm_config.compilation_config.static_forward_context[NAME] = mlp
    return mlp
