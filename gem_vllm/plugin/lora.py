"""The adapter: a LoRA that acts at special positions and nowhere else.

At a special position a targeted linear layer gives ``W x + (alpha / r) B A x``, elsewhere ``W x``
(checkpoint contract, adapter mode). The layers of a vLLM model are packed (`qkv_proj`,
`gate_up_proj`) and sharded by tensor parallelism, so the LoRAs of a packed layer become one pair:
A stacked, B block-diagonal, sharded by the layer's own weight loader. The pair is added inside
`quant_method.apply`, that is before a row-parallel layer's all-reduce, which then sums the shards
of the correction together with those of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.models.utils import is_pp_missing_parameter
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
    direct_register_custom_op,
)

from gem_vllm.adapter import read_lora
from gem_vllm.errors import GemConfigError
from gem_vllm.plugin import step as gem_step

_PEFT_PREFIX = "base_model.model."


class SpecialLoRA:
    """One linear layer's pair, multiplied as vLLM multiplies by a layer's weight.

    Args:
        lora_a: [r, in].
        lora_b: [out, r], scaled by alpha / r.

    Attributes:
        weights: the two, as they are multiplied by.
    """

    def __init__(self, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        self._method = UnquantizedLinearMethod()
        self._factors = []
        for weight in (lora_a, lora_b):
            factor = nn.Module()
            factor.weight = nn.Parameter(weight, requires_grad=False)
            # On a CPU this packs the weight for the kernel that suits its shape.
            self._method.process_weights_after_loading(factor)
            self._factors.append(factor)
        self.weights = [factor.weight.data for factor in self._factors]

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> None:
        """Add ``B A x`` at this step's special rows, in place.

        Args:
            output: [tokens, out], the layer's own result.
            x: [tokens, in], the layer's input.
        """
        step = gem_step.current()
        if step is None or not len(step.rows):
            return
        special = x.index_select(0, step.rows)
        for factor in self._factors:
            special = self._method.apply(factor, special, None)
        output.index_add_(0, step.rows, special)


# A name of vLLM's own type is no constant of a graph: graphs of layers alike are compiled once.
def _special_lora(output: torch.Tensor, x: torch.Tensor, name: LayerNameType) -> None:
    get_forward_context().no_compile_layers[_resolve_layer_name(name)].add_to(output, x)


def _special_lora_fake(output: torch.Tensor, x: torch.Tensor, name: LayerNameType) -> None:
    return None


direct_register_custom_op(
    op_name="gem_special_lora",
    op_func=_special_lora,
    mutates_args=["output"],
    fake_impl=_special_lora_fake,
)


class SpecialLoRALinearMethod(LinearMethodBase):
    """A layer's own linear method, then the LoRA at special rows.

    Args:
        base: the layer's own method.
        lora: what to add.
        name: of `lora` among the layers that a compiled graph looks up when it runs.
    """

    def __init__(self, base: Any, lora: SpecialLoRA, name: str) -> None:
        self.base, self.lora, self.name = base, lora, name

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.base.process_weights_after_loading(layer)

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        output = self.base.apply(layer, x, bias)
        if torch.compiler.is_compiling():
            # A graph is traced once, and must not look into the step.
            torch.ops.vllm.gem_special_lora(output, x, _encode_layer_name(self.name))
        else:
            self.lora.add_to(output, x)
        return output


def attach_adapter(model: nn.Module, vllm_config: VllmConfig, folder: Path) -> None:
    """Give every targeted linear layer of `model` its share of the adapter in `folder`.

    Args:
        model: a vLLM model with its weights loaded.
        vllm_config: the engine's; the LoRAs are entered among the layers of its forward context.
        folder: holds PEFT's `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        GemConfigError: files missing, PEFT options that are not supported, layers that the model
            does not have.
    """
    scale, pairs = _read_adapter(folder)
    packed_modules: Mapping[str, list[str]] = model.packed_modules_mapping
    # Other ranks' layers, where a pipeline has several: there each layer is but a placeholder.
    pairs = {name: pair for name, pair in pairs.items() if not is_pp_missing_parameter(name, model)}
    device, dtype = vllm_config.device_config.device, vllm_config.model_config.dtype
    names = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LinearBase):
            continue
        parent, _, leaf = name.rpartition(".")
        shards = [pairs.pop(f"{parent}.{part}", None) for part in packed_modules.get(leaf, [leaf])]
        if any(pair is not None for pair in shards):
            lora_a, lora_b = (
                weight.to(device, dtype).contiguous() for weight in _pack(layer, shards, scale)
            )
            lora, lora_name = SpecialLoRA(lora_a, lora_b), f"{name}.gem_lora"
            vllm_config.compilation_config.static_forward_context[lora_name] = lora
            for letter, weight in zip("ab", lora.weights, strict=True):
                # As a buffer it outlives vLLM's sleep, which drops all weights at level 2.
                layer.register_buffer(f"gem_lora_{letter}", weight, persistent=False)
            layer.quant_method = SpecialLoRALinearMethod(layer.quant_method, lora, lora_name)
            # vLLM would fuse an activation with its quantization, of which a LoRA has no use.
            layer.requires_unquantized_input = True
            names.append(lora_name)
    # Into the key of vLLM's compile cache: a stored graph calls the LoRAs of exactly these layers.
    vllm_config.additional_config["gem_lora"] = names
    if pairs:
        raise GemConfigError(
            f"the adapter in {folder} targets layers that the model does not have: "
            f"{', '.join(sorted(pairs)[:3])}. It belongs to another base model."
        )


def _read_adapter(folder: Path) -> tuple[float, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """alpha / r, and module name to its (A [r, in], B [out, r])."""
    config, weights = read_lora(folder)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for key in weights:
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            other = f"{stem}.lora_B.weight"
            if other not in weights:
                raise GemConfigError(f"{folder} has no {other}; copy or download it again")
            pairs[stem.removeprefix(_PEFT_PREFIX)] = (
                weights[key].float(),
                weights[other].float(),
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
