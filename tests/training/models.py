"""Training models on tiny bases, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gem_vllm.checkpoint import add_special_tokens, load_base
from gem_vllm.training.adapter_model import AdapterModel, add_adapter
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.sequences import pad

K = 3
TEXT_LENGTHS = (5, 31, 1, 18, 12)
# Losses and gradients, by name.
StepResult = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def make_model(base: Path, kind: type[GemTrainingModel], pooling: str = "mean") -> Any:
    model, tokenizer = load_base(base, dtype=torch.float32)
    ids = add_special_tokens(model, tokenizer, K)
    lm: Any = model
    if kind is AdapterModel:
        lm = add_adapter(model, ids, rank=4, alpha=8)
        random = torch.Generator().manual_seed(5)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=random)
    return kind(lm, ids, pooling, scale=20.0, symmetric=False), tokenizer


def random_texts(lengths: tuple[int, ...] = TEXT_LENGTHS) -> list[list[int]]:
    random = torch.Generator().manual_seed(9)
    return [torch.randint(5, 400, (n,), generator=random).tolist() for n in lengths]


def step(model: GemTrainingModel, device: str = "cpu") -> StepResult:
    """Losses and gradients of one batch with both phases, brought back to the CPU."""
    special = list(model.special_ids)
    texts = random_texts((5, 31, 7, 18, 12, 9))
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
    gradients = {
        name: parameter.grad.to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {name: loss.detach().cpu() for name, loss in losses.items()}, gradients
