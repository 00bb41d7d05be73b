"""Speculative decoding by n-grams: tokens and embeddings are what they are without it.

The engine is in a process of its own: vLLM's n-gram search brings numba, beside which no other
engine starts on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embeddings_of,
    named,
    random_prompts,
    run_together,
    running_engine,
)
from tests.plugin.test_behind_runs import tokens_of, with_runs

NEW = 40
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
SPECULATIVE = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}


def accepted_drafts(llm: LLM) -> int:
    name = "vllm:spec_decode_num_accepted_tokens"
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


@pytest.mark.parametrize(
    "beside_chat",
    [
        pytest.param(None, id="any share"),
        pytest.param(24, id="a small share", marks=pytest.mark.slow),
    ],
)
def test_by_ngrams(
    beside_chat: int | None,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks, with runs inside prompts, beside texts to embed, and from the prefix cache."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = tiny_checkpoint("llama", k=4)
    reference = ReferenceEmbedder(folder)
    special_ids = reference.gem_config.special_token_ids
    shapes = [(5, 3), (31, 40), (47, 9, 33)]
    prompts = [
        *random_prompts([3, 17, 60]),
        *(with_runs(special_ids, *shape, seed=10 + i) for i, shape in enumerate(shapes)),
    ]
    texts = [*random_prompts([1, 17, 64, 90], seed=1), prompts[3]]
    states = [reference.hidden_states([*text, *special_ids])[-4:].mean(0) for text in texts]
    expected = [reference.generate(prompt, NEW) for prompt in prompts]
    options = {"gem_tokens_beside_chat": beside_chat} if beside_chat else {}
    with running_engine(
        folder,
        max_model_len=256,
        max_num_batched_tokens=96,
        speculative_config=SPECULATIVE,
        additional_config=options,
        disable_log_stats=False,
    ) as llm:
        for _ in range(2):
            requests = named("chat", prompts, GREEDY) | named("text", texts, EMBED)
            outputs = run_together(llm, requests)
            assert tokens_of(outputs, len(prompts)) == expected
            found = embeddings_of(outputs, len(texts))
            assert cosines(found, torch.stack(states)).min() >= 0.9999
        assert accepted_drafts(llm) > 0
