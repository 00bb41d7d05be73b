"""Generation and embedding behind runs of special tokens, against the float32 reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gem_vllm.config import GemConfig
from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    forget_backends,
    free_blocks,
    named,
    noted_preemptions,
    random_prompts,
    run_together,
    running_engine,
    scheduler_of,
)
from tests.plugin.mixed_load import MixedLoad, greedy, tokens_of, with_runs
from tests.tiny import FAMILIES

LIMIT = 512
NEW = 12
GREEDY = greedy(NEW)


def prompts_with_runs(special_ids: tuple[int, ...]) -> list[list[int]]:
    """Runs in the middle, at the end, chained, at and around the borders of KV blocks."""
    shapes = [(5, 3), (32, 1), (31, 40), (33, 0), (128, 7), (127, 0), (130, 140)]
    chained = [(20, 9, 4), (40, 32, 31, 3), (1, 1, 1, 0), (128, 128, 5)]
    return [
        with_runs(special_ids, *shape, seed=seed) for seed, shape in enumerate([*shapes, *chained])
    ]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_behind_runs(family: str, k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(family, k=k)
    prompts = prompts_with_runs(GemConfig.from_pretrained(folder).special_token_ids)
    load = MixedLoad.of(folder, prompts, random_prompts([1, 40, 128]), NEW)
    with running_engine(folder, max_model_len=LIMIT) as llm:
        before = free_blocks(llm)
        first = run_together(llm, named("chat", prompts, GREEDY))
        # Again, with the prefix cache, and with texts to embed in the same steps.
        outputs = load.check(llm)
        assert free_blocks(llm) == before
    assert tokens_of(first, len(prompts)) == load.tokens
    for i, prompt in enumerate(prompts):
        assert outputs[f"chat-{i}"].prompt_token_ids == prompt  # padding is not the user's


def test_a_plain_model_of_the_same_shape_came_before(
    tiny_checkpoint: Callable[..., Path], tiny_base: Callable[..., Path]
) -> None:
    """In one process; vLLM keeps which attention it has chosen for layers alike."""
    folder = tiny_checkpoint("llama", k=1)
    prompts = prompts_with_runs(GemConfig.from_pretrained(folder).special_token_ids)
    load = MixedLoad.of(folder, prompts, random_prompts([1, 40, 128]), NEW)
    forget_backends()
    with running_engine(tiny_base("llama"), max_model_len=LIMIT) as llm:
        run_together(llm, named("chat", random_prompts([3, 50]), GREEDY))
    with running_engine(folder, max_model_len=LIMIT) as llm:
        load.check(llm)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_runs_across_chunks_at_every_offset(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """With a budget of 16 tokens a step; in Gemma's sliding layers blocks are given back early."""
    folder = tiny_checkpoint(family, k=10)
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    prompts = [with_runs(special_ids, length, 20 - length % 16, seed=length)
               for length in range(30, 66)]  # fmt: skip
    load = MixedLoad.of(folder, prompts, random_prompts(range(30, 66)), NEW)
    with running_engine(
        folder, max_model_len=LIMIT, max_num_batched_tokens=16, max_num_seqs=8
    ) as llm:
        load.check(llm)


def test_prefix_cache_hits_at_every_offset(tiny_checkpoint: Callable[..., Path]) -> None:
    """A hit may end before, in and behind the run, which is longer than the rest of its block."""
    folder = tiny_checkpoint("llama", k=10)
    reference = ReferenceEmbedder(folder)
    prompt = with_runs(reference.gem_config.special_token_ids, 50, 90)
    lengths = [*range(20, 64, 7), *range(60, len(prompt) + 1, 3)]
    ends = [n for n in lengths if not 50 < n < 60]
    expected = [reference.generate(prompt[:n], NEW) for n in ends]
    with running_engine(folder, max_model_len=LIMIT) as llm:
        for _ in range(2):
            for n, tokens in zip(ends, expected, strict=True):
                found = run_together(llm, named("chat", [prompt[:n]], GREEDY))
                assert tokens_of(found, 1) == [tokens]
        # With its padding the prompt is 64 + 10 + 90 tokens long, of which whole blocks are reused:
        # all but the last 4 of the 150 tokens that are the user's.
        assert found["chat-0"].num_cached_tokens == 146


@pytest.mark.parametrize("k", [1, 4])
def test_decoding_from_special_tokens_alone(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=k)
    reference = ReferenceEmbedder(folder)
    special_ids = list(reference.gem_config.special_token_ids)
    texts = random_prompts([3, 31, 32, 100, 200])
    expected = [reference.decode_from_special_tokens(text, NEW) for text in texts]
    with running_engine(folder, max_model_len=LIMIT) as llm:
        prompts = [text + special_ids for text in texts]
        assert tokens_of(run_together(llm, named("chat", prompts, GREEDY)), 5) == expected


def test_texts_with_runs_in_them_are_embedded(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=4)
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    prompts = [with_runs(special_ids, *shape) for shape in [(5, 3), (70, 40), (33, 31, 7)]]
    load = MixedLoad.of(folder, [], prompts, NEW)
    with running_engine(folder, max_model_len=LIMIT) as llm:
        for _ in range(2):
            load.check(llm)


def test_preempted_requests_come_out_right(tiny_checkpoint: Callable[..., Path]) -> None:
    """A KV cache of 24 blocks: blocks before runs are given back, and all of them on preemption."""
    folder = tiny_checkpoint("llama", k=4)
    reference = ReferenceEmbedder(folder)
    special_ids = reference.gem_config.special_token_ids
    prompts = [with_runs(special_ids, 100 + 30 * n, 50, seed=n) for n in range(5)]
    expected = [reference.generate(prompt, 100) for prompt in prompts]
    long = greedy(100)
    with running_engine(folder, max_model_len=LIMIT, num_gpu_blocks_override=24) as llm:
        before, scheduler = free_blocks(llm), scheduler_of(llm)
        preempted = noted_preemptions(llm)
        outputs = run_together(llm, named("chat", prompts, long))
        assert free_blocks(llm) == before
        assert not scheduler._runs.keys() & scheduler.requests.keys()
    assert preempted
    for found, tokens in zip(tokens_of(outputs, 5), expected, strict=True):
        assert found[: len(tokens)] == tokens


def test_compiled(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=4)
    reference = ReferenceEmbedder(folder)
    prompts = prompts_with_runs(reference.gem_config.special_token_ids)
    expected = [reference.generate(prompt, NEW) for prompt in prompts]
    with running_engine(folder, max_model_len=LIMIT, enforce_eager=False) as llm:
        outputs = run_together(llm, named("chat", prompts, GREEDY))
    assert tokens_of(outputs, len(prompts)) == expected


def test_memory_follows_the_mask(tiny_checkpoint: Callable[..., Path]) -> None:
    """A prefix of 4,000 tokens, read through 8 special tokens, holds no block once they are there.

    The cache has room for two such prefixes at a time, and for many times as many requests that
    are through with theirs.
    """
    block, prefix, together = 32, 4000, 24
    folder = tiny_checkpoint("llama", k=8, max_position_embeddings=4352)
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    prompts = [with_runs(special_ids, prefix, 20, seed=n) for n in range(together)]
    long = greedy(200)
    with running_engine(
        folder,
        max_model_len=4352,
        num_gpu_blocks_override=2 * (prefix // block) + 60,
        max_num_batched_tokens=4352,
        enable_prefix_caching=False,
    ) as llm:
        scheduler = scheduler_of(llm)
        (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
        for name, (prompt, params) in named("chat", prompts, long).items():
            llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params)
        running, held = 0, 0
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
            running = max(running, len(scheduler.running))
            for request in scheduler.running:
                if request.num_output_tokens > 3:
                    blocks = manager.req_to_blocks[request.request_id]
                    held = max(held, sum(not each.is_null for each in blocks))
    # 8 special tokens, 20 behind them and up to 200 generated.
    assert held <= -(-(8 + 20 + 200) // block)
    # Those who hold all of their prefix are two at most.
    assert running >= 8
