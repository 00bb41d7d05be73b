"""Training on CUDA computes what it computes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.dense_model import DenseModel
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.sequences import pad
from tests.training.models import make_model, random_texts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTHS = (5, 31, 7, 18, 12, 9)
Result = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def step(model: GemTrainingModel, device: str) -> Result:
    """Losses and gradients of one batch with both phases, brought back to the CPU."""
    special = list(model.special_ids)
    texts = random_texts(LENGTHS)
    ids, lengths = pad(texts)
    mixed = [text if row % 3 == 0 else [*text, *special, *text] for row, text in enumerate(texts)]
    ntp_ids, ntp_lengths = pad(mixed)
    model.to(device).zero_grad()
    losses = model(
        torch.tensor(0.5, device=device),
        cl_ids=ids.to(device),
        cl_lengths=lengths.to(device),
        ntp_ids=ntp_ids.to(device),
        ntp_lengths=ntp_lengths.to(device),
    )
    losses["loss"].backward()
    gradients = {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients


def assert_same(found: Result, expected: Result) -> None:
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
