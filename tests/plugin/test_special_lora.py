"""The LoRA at special rows, adapters that are refused, the room for Python's frames: no engine."""

from __future__ import annotations

import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gem_vllm.adapter import ADAPTER_FOLDER
from gem_vllm.errors import GemConfigError
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.frames import with_room
from gem_vllm.plugin.lora import SpecialLoRA, attach_adapter
from gem_vllm.plugin.step import GemStep


def step_with(rows: list[int]) -> GemStep:
    index = np.zeros(len(rows), dtype=np.int64)
    return GemStep(
        rows=torch.tensor(rows, dtype=torch.int64),
        rows_np=np.array(rows, dtype=np.int64),
        request_index=index,
        special_index=index,
        seen_from=index,
        seen_to=index,
        needs_mask=index > 0,
        num_read=len(rows),
        segments=None,
        position_shift=None,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("sizes", [(576, 1536, 16), (576, 960, 48), (48, 40, 4), (33, 17, 3)])
def test_the_lora_is_added_at_special_rows_only(
    sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    n_in, n_out, rank = sizes
    x, output = torch.randn(10, n_in, dtype=dtype), torch.randn(10, n_out, dtype=dtype)
    lora_a = (torch.randn(rank, n_in) / n_in**0.5).to(dtype)
    lora_b = (torch.randn(n_out, rank) / rank**0.5).to(dtype)
    expected = output.float()
    rows = [2, 7, 8]
    expected[rows] += x[rows].float() @ lora_a.float().T @ lora_b.float().T
    before, lora = output.clone(), SpecialLoRA(lora_a.clone(), lora_b.clone())

    for nothing in (None, step_with([])):
        gem_step.publish(nothing)
        lora.add_to(output, x)
        assert torch.equal(output, before), "no special rows in this step"
    gem_step.publish(step_with(rows))
    try:
        lora.add_to(output, x)
    finally:
        gem_step.publish(None)

    others = [i for i in range(10) if i not in rows]
    assert torch.equal(output[others], before[others])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def attach(folder: Path) -> None:
    """Attach the adapter in `folder` to a model without linear layers."""
    model = torch.nn.Module()
    model.packed_modules_mapping = {}
    config: Any = SimpleNamespace(
        device_config=SimpleNamespace(device=torch.device("cpu")),
        model_config=SimpleNamespace(dtype=torch.float32),
        additional_config={},
    )
    attach_adapter(model, config, folder)


def test_an_adapter_of_layers_that_are_not_there_is_refused(
    tiny_checkpoint: Callable[..., Path],
) -> None:
    layers = r"model\.layers\.0\.mlp\.down_proj, .*\. It belongs to another base model"
    with pytest.raises(GemConfigError, match=f"layers that the model does not have: {layers}"):
        attach(tiny_checkpoint("llama", k=4) / ADAPTER_FOLDER)


@pytest.mark.parametrize("layer", ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"])
def test_half_of_a_pair_is_refused(
    layer: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_checkpoint("llama", k=4) / ADAPTER_FOLDER, tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    lost = f"base_model.model.model.{layer}.lora_B.weight"
    rest = {name: tensor.clone() for name, tensor in tensors.items() if name != lost}
    assert len(rest) == len(tensors) - 1
    save_file(rest, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GemConfigError, match=f"has no {re.escape(lost)}; copy or download it"):
        attach(folder)


def leaf() -> None:
    """Its frame is larger than those of `descend`, so that one depth has room for no more of it."""


leaf.__code__ = leaf.__code__.replace(co_stacksize=100)


def page_faults_of_a_loop() -> int:
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(500):
        leaf()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def descend(depth: int) -> int:
    return page_faults_of_a_loop() if depth == 0 else descend(depth - 1)


def test_frames_of_a_step_share_a_chunk() -> None:
    depths = range(300)
    assert max(with_room(descend, depth) for depth in depths) < 100
    if sys.version_info < (3, 12):
        assert max(descend(depth) for depth in depths) >= 500, "the loop shows nothing"


def test_with_room_passes_everything_on() -> None:
    assert with_room(sorted, [1, 3, 2], reverse=True) == [3, 2, 1]
    with pytest.raises(ZeroDivisionError):
        with_room(divmod, 1, 0)
