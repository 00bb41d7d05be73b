"""Training models on tiny bases, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gem_vllm.checkpoint import add_special_tokens, load_base
from gem_vllm.training.adapter_model import AdapterModel, add_adapter
from gem_vllm.training.model import GemTrainingModel

K = 3
TEXT_LENGTHS = (5, 31, 1, 18, 12)


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
