"""The oracle of the training forwards: the reference, with gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from gem_vllm.checkpoint import save_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.training.adapter_model import AdapterModel, special_rows
from gem_vllm.training.model import GemTrainingModel


def make_oracle(model: GemTrainingModel, tokenizer: Any, folder: Path) -> ReferenceEmbedder:
    mode = "adapter" if isinstance(model, AdapterModel) else "full"
    save_checkpoint(folder, model.lm, tokenizer, GemConfig(model.special_ids, "mean", mode, "tiny"))
    return ReferenceEmbedder(folder)


def oracle_states(oracle: ReferenceEmbedder, row: list[int]) -> torch.Tensor:
    """[T, hidden], with gradients."""
    inputs = oracle._inputs(row)
    return oracle.model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def oracle_ntp_loss(oracle: ReferenceEmbedder, rows: list[list[int]]) -> torch.Tensor:
    """Of the tokens behind a run, and of all tokens in rows without one: summed, then averaged."""
    special, losses = oracle._special_ids, []
    for row in rows:
        hidden = oracle_states(oracle, row)
        logits = oracle.model.get_output_embeddings()(hidden)
        softcap = getattr(oracle.model.config, "final_logit_softcapping", None)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        never = torch.zeros(logits.shape[-1], dtype=torch.bool)
        never[special] = True
        log_p = F.log_softmax(logits.masked_fill(never, -torch.inf), dim=-1)
        first = row.index(special[0]) if special[0] in row else None
        for i, label in enumerate(row[1:]):
            if label not in special and (first is None or i >= first):
                losses.append(-log_p[i, label])
    return torch.stack(losses).mean()


def special_rows_gradient(oracle: ReferenceEmbedder) -> torch.Tensor:
    gradient = oracle.model.get_input_embeddings().weight.grad
    assert gradient is not None
    return gradient[oracle._special_ids]


def assert_same_adapter_gradients(model: AdapterModel, oracle: ReferenceEmbedder) -> None:
    expected = {
        name: parameter.grad
        for name, parameter in oracle.model.named_parameters()
        if "lora_" in name
    }
    found = {
        name: parameter.grad for name, parameter in model.base.named_parameters() if "lora_" in name
    }
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_near(found[name], gradient, name)
    assert_near(special_rows(model.lm).grad, special_rows_gradient(oracle), "special rows")


def assert_near(found: torch.Tensor | None, expected: torch.Tensor | None, name: str) -> None:
    assert found is not None
    assert expected is not None
    assert expected.norm() > 0, name
    assert (found - expected).norm() < 1e-4 * expected.norm(), name


def with_gradients(oracle: ReferenceEmbedder) -> ReferenceEmbedder:
    for name, parameter in oracle.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    oracle.model.get_input_embeddings().weight.requires_grad_(True)
    return oracle
