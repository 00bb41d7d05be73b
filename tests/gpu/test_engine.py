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
    drafted_and_accepted,
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


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_bfloat16_alone_and_mixed(
    family: str, k: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    folder = tiny_checkpoint(family, k=k)
    prompts = random_prompts([1, 2, 15, 16, 17, 127, 128, 255 - k])
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


@pytest.mark.parametrize("runner", ["V2", "V1"])
def test_asynchronous_scheduling_and_none(
    runner: str, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a CPU has not: a step is scheduled before the last one's tokens are known."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "V2")))
    folder = tiny_checkpoint("llama", k=4)
    texts = random_prompts([1, 16, 127, 250])
    questions = random_prompts([5, 40, 130], seed=1)
    expected = ReferenceEmbedder(folder).embed(texts)
    first = []
    for asynchronous in (True, False):
        with running_engine(
            folder, max_model_len=256, dtype="bfloat16", async_scheduling=asynchronous
        ) as llm:
            scheduler_config = llm.llm_engine.vllm_config.scheduler_config
            assert scheduler_config.async_scheduling is asynchronous
            outputs = run_together(
                llm, named("chat", questions, GREEDY) | named("text", texts, EMBED)
            )
            assert step_counts(llm)["mixed"] > 0
        assert cosines(embeddings_of(outputs, len(texts)), expected).min() >= 0.999
        answers = [outputs[f"chat-{i}"].outputs[0].token_ids for i in range(len(questions))]
        assert [len(answer) for answer in answers] == [GREEDY.max_tokens] * len(answers)
        first.append([answer[:2] for answer in answers])
    assert first[0] == first[1]


@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLEX_ATTENTION"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_text_with_runs_in_it(
    family: str, backend: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Special tokens inside a prompt, and rows behind them, in chunks and from the prefix cache."""
    folder = tiny_checkpoint(family, k=4)
    reference = ReferenceEmbedder(folder)
    special_ids = list(reference.gem_config.special_token_ids)
    prompts = [
        [*a, *special_ids, *b, *special_ids, *c]
        for a, b, c in zip(
            random_prompts([5, 16, 40], seed=1),
            random_prompts([3, 33, 16], seed=2),
            random_prompts([9, 1, 60], seed=3),
            strict=True,
        )
    ]
    states = [reference.hidden_states(prompt + special_ids)[-4:].mean(0) for prompt in prompts]
    with running_engine(
        folder,
        max_model_len=256,
        dtype="bfloat16",
        max_num_batched_tokens=48,
        attention_backend=backend,
    ) as llm:
        for _ in range(2):
            assert cosines(embed(llm, prompts), torch.stack(states)).min() >= 0.999


@pytest.mark.parametrize("runner", ["V2", "V1"])
@pytest.mark.parametrize("k", [1, 4])
def test_compiled_and_with_cuda_graphs(
    k: int,
    runner: str,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As `vllm serve` runs: embeddings, chats alone, both at once, and chats behind runs."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "V2")))
    folder = tiny_checkpoint("llama", k=k)
    reference = ReferenceEmbedder(folder)
    special_ids = list(reference.gem_config.special_token_ids)
    texts = random_prompts([1, 2, 15, 16, 17, 127, 128, 250])
    questions = random_prompts([5, 40, 130], seed=1)
    behind = [[*question, *special_ids, 7, 8] for question in questions]
    requests = [
        named("chat", questions, GREEDY),
        named("text", texts, EMBED) | named("chat", questions, GREEDY),
        named("text", texts, EMBED) | named("chat", behind, GREEDY),
    ]
    found = {}
    for eager in (True, False):
        with running_engine(
            folder, max_model_len=256, dtype="bfloat16", enforce_eager=eager
        ) as llm:
            found[eager] = [run_together(llm, some) for some in requests]
    for outputs in found[False][1:]:
        texts_found = embeddings_of(outputs, len(texts))
        assert cosines(texts_found, reference.embed(texts)).min() >= 0.999
    # A graph that is not of its step gives other tokens from the first on.
    for eager, compiled in zip(found[True], found[False], strict=True):
        for name in eager:
            if name.startswith("chat"):
                first = [outputs[name].outputs[0].token_ids[:2] for outputs in (eager, compiled)]
                assert first[0] == first[1], name


@pytest.mark.parametrize("runner", ["V2", "V1"])
def test_speculative_decoding_by_a_draft_model(
    runner: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With CUDA graphs, and steps that are scheduled before it is known what is accepted."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner == "V2")))
    folder = tiny_checkpoint("llama", k=4)
    special_ids = list(ReferenceEmbedder(folder).gem_config.special_token_ids)
    texts = random_prompts([1, 16, 127, 250])
    questions = random_prompts([5, 40, 130], seed=1)
    behind = [[*question, *special_ids, 7, 8] for question in questions]
    drafts = {
        "method": "draft_model",
        "model": str(tiny_base("llama")),
        "num_speculative_tokens": 3,
    }
    with running_engine(
        folder,
        max_model_len=256,
        dtype="bfloat16",
        enforce_eager=False,
        speculative_config=drafts,
        disable_log_stats=False,
    ) as llm:
        outputs = run_together(llm, named("chat", questions, GREEDY) | named("text", texts, EMBED))
        expected = ReferenceEmbedder(folder).embed(texts)
        assert cosines(embeddings_of(outputs, len(texts)), expected).min() >= 0.999
        drafted, accepted = drafted_and_accepted(llm)
        # A chat's tokens are the base's, which drafts them, but for ties in bfloat16.
        assert accepted >= 0.8 * drafted > 0
        outputs = run_together(llm, named("chat", behind, GREEDY))
    assert [len(outputs[f"chat-{i}"].outputs[0].token_ids) for i in range(3)] == [24] * 3
