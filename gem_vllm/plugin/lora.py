"""The adapter: a LoRA that acts at special positions and nowhere else.

At a special position a targeted linear layer gives ``W x + (alpha / r) B A x``, elsewhere ``W x``
(checkpoint contract, adapter mode). The layers of a vLLM model are packed (`qkv_proj`,
`gate_up_proj`) and sharded by tensor parallelism, so the LoRAs of a packed layer become one pair:
A stacked, B block-diagonal, sharded by the layer's own weight loader. The pair is added inside
`quant_method.apply`, that is before a row-parallel layer's all-reduce, which then sums the shards
of the correction together with those of the layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import direct_register_custom_op

from gem_vllm.config import GemConfigError
from gem_vllm.plugin import step as gem_step

_PEFT_PREFIX = "base_model.model."


def _special_lora(
    output: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> None:
    """Add ``B A x`` to `output` at this step's special rows, in place.

    Args:
        output: [tokens, out], the layer's own result.
        x: [tokens, in], the layer's input.
        lora_a: [in, r], A transposed.
        lora_b: [r, out], B transposed, scaled by alpha / r.
    """
    step = gem_step.current()
    if step is not None:
        # The few rows of a step make this a matter of calls, not of arithmetic.
        special = x.index_select(0, step.rows)
        output.index_add_(0, step.rows, special.mm(lora_a).mm(lora_b))


def _special_lora_fake(
    output: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
) -> None:
    return None


direct_register_custom_op(
    op_name="gem_special_lora",
    op_func=_special_lora,
    mutates_args=["output"],
    fake_impl=_special_lora_fake,
)


class SpecialLoRALinearMethod(LinearMethodBase):
    """A layer's own linear method, then the LoRA at special rows."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = self.base.apply(layer, x, bias)
        # A custom op where the graph is traced, which must not look into the step.
        tracing = torch.compiler.is_compiling()
        add = torch.ops.vllm.gem_special_lora if tracing else _special_lora
        add(output, x, layer.gem_lora_a, layer.gem_lora_b)
        return output


def attach_adapter(
    model: nn.Module, packed_modules: Mapping[str, list[str]], folder: Path, dtype: torch.dtype
) -> None:
    """Give every targeted linear layer of `model` its share of the adapter in `folder`.

    Args:
        model: a vLLM model with its weights loaded.
        packed_modules: vLLM's name of a packed layer to the names that the checkpoint uses.
        folder: holds PEFT's `adapter_config.json` and `adapter_model.safetensors`.
        dtype: the engine's dtype.

    Raises:
        GemConfigError: files missing, PEFT options that are not supported, layers that the model
            does not have.
    """
    scale, pairs = _read_adapter(folder)
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        shards = [pairs.pop(f"{parent}.{part}", None) for part in packed_modules.get(leaf, [leaf])]
        if any(pair is not None for pair in shards):
            lora_a, lora_b = _pack(layer, shards, scale)
            device = layer.weight.device
            for side, weight in (("gem_lora_a", lora_a), ("gem_lora_b", lora_b)):
                transposed = weight.t().to(device, dtype).contiguous()
                layer.register_buffer(side, transposed, persistent=False)
            layer.quant_method = SpecialLoRALinearMethod(layer.quant_method)
    if pairs:
        raise GemConfigError(
            f"the adapter in {folder} targets layers that the model does not have: "
            f"{', '.join(sorted(pairs)[:3])}. It belongs to another base model."
        )


def _read_adapter(folder: Path) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """alpha / r, and module name to its (A [r, in], B [out, r])."""
    config_file, weights_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise GemConfigError(
                f"{file} is missing: gem_config says train_mode 'adapter'. "
                "Copy the checkpoint again, with its gem_adapter folder."
            )
    config = json.loads(config_file.read_text())
    for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(option):
            raise GemConfigError(f"{config_file}: PEFT's {option} is not supported.")
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    weights = load_file(weights_file)
    for key in weights:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            pairs[stem.removeprefix(_PEFT_PREFIX)] = (
                weights[key].float(),
                weights[f"{stem}.lora_B.weight"].float(),
            )
    return config["lora_alpha"] / config["r"], pairs


def _pack(
    layer: LinearBase,
    shards: list[tuple[torch.Tensor, torch.Tensor] | None],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's A [R, in] and scaled block-diagonal B [out, R]; R is the sum of the ranks."""
    ranks = [0 if pair is None else pair[0].shape[0] for pair in shards]
    total = sum(ranks)
    lora_a = torch.cat([pair[0] for pair in shards if pair is not None])
    if isinstance(layer, RowParallelLinear):
        (pair,) = shards
        assert pair is not None
        sharded_a = nn.Parameter(torch.zeros(total, layer.input_size_per_partition))
        sharded_a.input_dim = 1
        layer.weight_loader(sharded_a, lora_a)
        return sharded_a.data, pair[1] * scale

    sharded_b = nn.Parameter(torch.zeros(layer.output_size_per_partition, total))
    sharded_b.output_dim = 0
    for i, pair in enumerate(shards):
        if pair is None:
            continue
        block = torch.zeros(pair[1].shape[0], total)
        block[:, sum(ranks[:i]) : sum(ranks[: i + 1])] = pair[1] * scale
        if isinstance(layer, QKVParallelLinear):
            layer.weight_loader(sharded_b, block, "qkv"[i])
        elif isinstance(layer, MergedColumnParallelLinear):
            layer.weight_loader(sharded_b, block, i)
        else:
            layer.weight_loader(sharded_b, block)
    return lora_a, sharded_b.data
