"""Two workers share the model, by tensor or by pipeline: all outputs are the reference's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embeddings_of,
    free_blocks,
    is_interpreted,
    named,
    random_prompts,
    run_together,
    running_engine,
    scheduler_of,
)
from tests.plugin.random_load import RandomLoad, check, run_load

LIMIT = 512
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
HEADS = {"num_attention_heads": 4}
OF_ENGINE: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    "pipeline": {"pipeline_parallel_size": 2},
    "pipeline, chunks": {
        "pipeline_parallel_size": 2,
        "max_num_batched_tokens": 32,
        "num_gpu_blocks_override": 40,
    },
    "pipeline, compiled": {"pipeline_parallel_size": 2, "enforce_eager": False},
}


def held_by(worker: Any) -> int:
    """What a worker holds of requests."""
    batch = worker.model_runner.gem_batch
    return len(batch.pooling_params) + len(batch.partial_states) + len(batch.runs)


@pytest.fixture(autouse=True)
def a_core_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")


@pytest.mark.parametrize(
    ("how", "family", "kv_heads", "k"),
    [
        pytest.param("tensor", "llama", 2, 4, id="tensor, split KV heads"),
        pytest.param("tensor", "gemma2", 1, 1, id="tensor, replicated KV heads"),
        pytest.param("pipeline", "llama", 2, 4, id="pipeline"),
        pytest.param("pipeline, chunks", "gemma2", 1, 4, id="pipeline, chunks and few KV blocks"),
        pytest.param("pipeline, compiled", "qwen3", 2, 1, id="pipeline, compiled"),
    ],
)
def test_two_workers(
    how: str,
    family: str,
    kv_heads: int,
    k: int,
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
) -> None:
    shape = {**HEADS, "num_key_value_heads": kv_heads}
    folder = tiny_checkpoint(family, k=k, **shape)
    questions, texts = random_prompts([5, 40], seed=1), random_prompts([1, 30, 130, 200])
    requests = named("text", texts, EMBED) | named("chat", questions, GREEDY)
    load = RandomLoad(ReferenceEmbedder(folder), LIMIT, seed=4, abort_share=0.1)
    options = {"max_model_len": LIMIT, "distributed_executor_backend": "mp", **OF_ENGINE[how]}
    with running_engine(folder, **options) as llm:
        run_together(llm, {"first": ([5, 6], EMBED)})
        before = free_blocks(llm), llm.collective_rpc(held_by)
        check(load.reference, run_load(llm, load, 12 if is_interpreted() else 24, at_once=12))
        run_together(llm, {"last": ([5, 6], EMBED)})
        assert (free_blocks(llm), llm.collective_rpc(held_by)) == before
        assert not scheduler_of(llm).requests
        outputs = run_together(llm, requests)
    found = embeddings_of(outputs, len(texts))
    assert cosines(found, load.reference.embed(texts)).min() >= 0.9999
    base = AutoModelForCausalLM.from_pretrained(tiny_base(family, **shape), dtype=torch.float32)
    for i, question in enumerate(questions):
        expected = base.generate(
            torch.tensor([question]), do_sample=False, max_new_tokens=8, eos_token_id=None
        )
        assert outputs[f"chat-{i}"].outputs[0].token_ids == expected[0, len(question) :].tolist()


def test_structured_output_from_a_pipeline(tiny_checkpoint: Callable[..., Path]) -> None:
    """Of two steps in flight, one waits for the grammar of what the other gives."""
    pattern = "[a-z ]{3,9}"
    params = SamplingParams(
        temperature=0.0, max_tokens=12, structured_outputs=StructuredOutputsParams(regex=pattern)
    )
    texts = named("text", random_prompts([1, 60, 130]), EMBED)
    chats = named("chat", random_prompts([9, 90], seed=1), params)
    with running_engine(
        tiny_checkpoint("llama", k=4),
        max_model_len=256,
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:
        outputs = run_together(llm, texts | chats)
    for name in chats:
        assert re.fullmatch(pattern, outputs[name].outputs[0].text)
