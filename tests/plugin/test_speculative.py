"""Speculative decoding by n-grams: tokens and embeddings are what they are without it.

The engine is in a process of its own: vLLM's n-gram search brings numba, beside which no other
engine starts on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm import LLM

from gem_vllm.config import GemConfig
from tests.plugin.conftest import random_prompts, running_engine
from tests.plugin.mixed_load import MixedLoad, with_runs

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
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    shapes = [(5, 3), (31, 40), (47, 9, 33)]
    prompts = [
        *random_prompts([3, 17, 60]),
        *(with_runs(special_ids, *shape, seed=10 + i) for i, shape in enumerate(shapes)),
    ]
    texts = [*random_prompts([1, 17, 64, 90], seed=1), prompts[3]]
    load = MixedLoad.of(folder, prompts, texts, new=40)
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
            load.check(llm)
        assert accepted_drafts(llm) > 0
