"""Drafts for a GEM model without an engine: which are refused, what they are given and asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.config import speculative as vllm_speculative
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from gem_vllm.plugin.drafter import Drafter, lacks_special_tokens_only

SIZES = (5, 7)


class Head(nn.Module):
    """Stands for a draft model of `SIZES[0]` tokens."""

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return torch.stack([input_ids, positions])

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return None if not len(hidden_states) else hidden_states @ torch.ones(2, SIZES[0])


def drafting_head(sample_method: str) -> Any:
    head = Head()
    config = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: SIZES[1]),
        speculative_config=SimpleNamespace(
            draft_model_config=SimpleNamespace(get_vocab_size=lambda: SIZES[0]),
            draft_sample_method=sample_method,
        ),
    )
    Drafter.enable(head, config)
    return head


def test_a_draft_is_given_tokens_that_it_has() -> None:
    ids = torch.tensor([1, 4, 5, 6, 2])
    head = drafting_head("greedy")
    assert isinstance(head, Head)
    assert head(ids, torch.arange(5)).tolist() == [[1, 4, 0, 0, 2], [0, 1, 2, 3, 4]]
    assert ids.tolist() == [1, 4, 0, 0, 2]


@pytest.mark.parametrize(("sample_method", "width"), [("greedy", 5), ("probabilistic", 7)])
def test_logits_are_as_wide_as_they_have_to_be(sample_method: str, width: int) -> None:
    head = drafting_head(sample_method)
    logits = head.compute_logits(torch.ones(3, 2))
    assert logits.shape == (3, width)
    assert logits[:, :5].eq(2.0).all()
    assert logits[:, 5:].eq(-torch.inf).all()
    assert head.compute_logits(torch.ones(0, 2)) is None


@pytest.mark.parametrize(
    ("draft_size", "special_ids", "expected"),
    [
        (100, [100, 101], True),
        (102, [100, 101], True),  # The base's vocabulary had room for them.
        (101, [100, 101], True),
        (99, [100, 101], False),
        (103, [100, 101], False),
        (100, [50, 101], False),
    ],
)
def test_a_vocabulary_without_special_tokens(
    draft_size: int, special_ids: list[int], expected: bool
) -> None:
    assert lacks_special_tokens_only(draft_size, 102, special_ids) is expected


@pytest.mark.parametrize(
    ("speculative", "options", "message"),
    [
        ({"method": "draft_model"}, {}, "is a GEM checkpoint. Give the base"),
        ({"method": "suffix"}, {}, "not by suffix"),
        (
            {"method": "ngram", "prompt_lookup_max": 3},
            {"pipeline_parallel_size": 2},
            "Leave --speculative-config or --pipeline",
        ),
    ],
    ids=["GEM checkpoint", "suffix", "pipeline"],
)
def test_what_cannot_work_is_refused_at_start(
    speculative: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load_general_plugins()
    monkeypatch.setattr(vllm_speculative, "has_arctic_inference", lambda: True)
    folder = str(tiny_checkpoint("llama", k=4))
    speculative = {"num_speculative_tokens": 2, **speculative}
    if speculative["method"] == "draft_model":
        speculative["model"] = folder
    args = EngineArgs(model=folder, enforce_eager=True, speculative_config=speculative, **options)
    with pytest.raises(ValueError, match=message):
        args.create_engine_config()


@pytest.mark.parametrize("vocab_size", [300, 1000])
def test_a_draft_of_another_vocabulary_is_refused(
    vocab_size: int, tiny_checkpoint: Callable[..., Path], tiny_base: Callable[..., Path]
) -> None:
    load_general_plugins()
    other = tiny_base("llama", vocab_size=vocab_size)
    draft = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 2}
    args = EngineArgs(model=str(tiny_checkpoint("llama", k=4)), speculative_config=draft)
    with pytest.raises(ValueError, match="should have the same vocabulary size"):
        args.create_engine_config()
