"""Training on CUDA computes what it computes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.dense_model import DenseModel
from tests.training.models import StepResult, make_model, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def assert_same(found: StepResult, expected: StepResult) -> None:
    for name, loss in expected[0].items():
        torch.testing.assert_close(found[0][name], loss, atol=1e-4, rtol=1e-4)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_adapter(tiny_base: Callable[..., Path], family: str) -> None:
    model, _ = make_model(tiny_base(family), AdapterModel)
    expected = step(model, "cpu")
    assert_same(step(model, "cuda"), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_packed_rows_in_flex_attention(tiny_base: Callable[..., Path], family: str) -> None:
    """Of modes ``full`` and ``lora``, beside padded rows in SDPA on the CPU."""
    model, _ = make_model(tiny_base(family), DenseModel)
    expected = step(model, "cpu")
    model.pack_into = 48
    assert_same(step(model, "cuda"), expected)
