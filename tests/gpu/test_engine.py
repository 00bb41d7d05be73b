"""The engine on CUDA: embeddings as the float32 reference has them, alone and beside chats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import SamplingParams

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embed,
    embeddings_of,
    named,
    random_prompts,
    run_together,
    running_engine,
    step_counts,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_bfloat16_alone_and_mixed(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(family, k=1)
    prompts = random_prompts([1, 2, 15, 16, 17, 127, 128, 255])
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(folder, max_model_len=256, dtype="bfloat16") as llm:
        # Twice: the second time from the prefix cache.
        for _ in range(2):
            assert cosines(embed(llm, prompts), expected).min() >= 0.999
        questions = random_prompts([5, 40, 130], seed=1)
        outputs = run_together(
            llm, named("chat", questions, GREEDY) | named("text", prompts, EMBED)
        )
        assert step_counts(llm)["mixed"] > 0
    assert cosines(embeddings_of(outputs, len(prompts)), expected).min() >= 0.999
