"""Two workers share the model: embeddings and chat are those of the reference and of one worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

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

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize(
    ("family", "kv_heads", "k"),
    [("llama", 2, 4), ("gemma2", 1, 1)],
    ids=["split KV heads", "replicated KV heads"],
)
def test_two_workers(
    family: str,
    kv_heads: int,
    k: int,
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    shape = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    folder = tiny_checkpoint(family, k=k, **shape)
    prompts, questions = random_prompts([1, 30, 130, 200]), random_prompts([5, 40], seed=1)
    with running_engine(
        folder,
        max_model_len=256,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:
        outputs = run_together(
            llm,
            named("text", prompts, EMBED) | named("chat", questions, GREEDY),
        )
    found = embeddings_of(outputs, len(prompts))
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999

    base = AutoModelForCausalLM.from_pretrained(tiny_base(family, **shape), dtype=torch.float32)
    for i, question in enumerate(questions):
        expected = base.generate(
            torch.tensor([question]), do_sample=False, max_new_tokens=8, eos_token_id=None
        )
        assert outputs[f"chat-{i}"].outputs[0].token_ids == expected[0, len(question) :].tolist()
