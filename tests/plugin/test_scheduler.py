"""The scheduler alone where steps are scheduled before the last one's tokens are known.

vLLM does so on CUDA and switches it off on a CPU, so no engine of these tests does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from latency_peer import bound_texts
from vllm import PoolingParams, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from gem_vllm.plugin.scheduler import GemScheduler
from tests.plugin.conftest import EMBED
from tests.plugin.mixed_load import greedy, with_runs

BLOCK, BLOCKS, K = 32, 100, 4


@pytest.fixture
def scheduler(tiny_checkpoint: Callable[..., Path]) -> GemScheduler:
    load_general_plugins()
    folder = str(tiny_checkpoint("llama", k=K))
    config = EngineArgs(model=folder, max_num_batched_tokens=256).create_engine_config()
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=16, dtype=torch.float32)
    cache = KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    init_none_hash(sha256)
    return GemScheduler(config, cache, StructuredOutputManager(config), BLOCK)


def add(
    scheduler: GemScheduler,
    name: str,
    prompt: Sequence[int],
    params: SamplingParams | PoolingParams,
) -> Request:
    pools = isinstance(params, PoolingParams)
    request = Request(
        name,
        list(prompt),
        None if pools else params,
        params if pools else None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )
    scheduler.add_request(request)
    return request


def finish(scheduler: GemScheduler, step: SchedulerOutput) -> dict[str, list[int]]:
    """A step's answers: token 7 for whoever is through with its prompt, or an embedding."""
    names = list(step.num_scheduled_tokens)
    requests = [scheduler.requests[name] for name in names]
    through = [not request.is_prefill_chunk for request in requests]
    embeds = [request.pooling_params is not None for request in requests]
    output = ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: i for i, name in enumerate(names)},
        sampled_token_ids=[
            [7] if done and not pools else [] for done, pools in zip(through, embeds, strict=True)
        ],
        pooler_output=[
            torch.ones(2) if done and pools else None
            for done, pools in zip(through, embeds, strict=True)
        ],
    )
    outputs = scheduler.update_from_output(step, output)
    return {
        each.request_id: each.new_token_ids
        for of_client in outputs.values()
        for each in of_client.outputs
    }


def test_an_embedding_is_no_token_to_go_on_from(scheduler: GemScheduler) -> None:
    add(scheduler, "text", range(3, 33), EMBED.clone())
    add(scheduler, "chat", range(3, 23), greedy(3))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.num_scheduled_tokens == {"text": 30 + K, "chat": 20}
    assert second.num_scheduled_tokens == {"chat": 1}
    assert finish(scheduler, first) == {"text": [], "chat": [7]}
    third = scheduler.schedule()
    assert third.num_scheduled_tokens == {"chat": 1}
    assert third.finished_req_ids == {"text"}
    assert finish(scheduler, second) == finish(scheduler, third) == {"chat": [7]}
    assert not scheduler.has_unfinished_requests()


def test_blocks_stay_until_the_step_that_reads_them_is_over(scheduler: GemScheduler) -> None:
    special_ids = scheduler.gem_config.special_token_ids
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks
    add(scheduler, "chat", with_runs(special_ids, 3 * BLOCK, 5), greedy(4))
    first = scheduler.schedule()
    assert free() == BLOCKS - 1 - 4
    second = scheduler.schedule()
    assert free() == BLOCKS - 1 - 4, "the first step, which is in flight, reads them"
    finish(scheduler, first)
    third = scheduler.schedule()
    assert free() == BLOCKS - 1 - 1
    for step in (second, third):
        finish(scheduler, step)


def test_texts_in_flight_are_no_chats_to_leave_room_for(scheduler: GemScheduler) -> None:
    scheduler._tokens_beside_chat = 8
    for i in range(8):
        add(scheduler, f"text-{i}", range(3 + i, 63 + i), EMBED.clone())
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first.total_num_scheduled_tokens == second.total_num_scheduled_tokens == 256
    add(scheduler, "chat", range(20, 28), greedy(4))
    finish(scheduler, first)
    third = scheduler.schedule()
    assert third.num_scheduled_tokens["chat"] == 8
    finish(scheduler, second)
    fourth = scheduler.schedule()
    assert fourth.num_scheduled_tokens["chat"] == 1
    assert fourth.total_num_scheduled_tokens <= 1 + 8
    for step in (third, fourth):
        finish(scheduler, step)


@pytest.mark.parametrize("v2_runner", [False, True])
def test_padding_is_taken_off_what_is_reported_once(
    scheduler: GemScheduler, v2_runner: bool
) -> None:
    """For the V2 runner a request that goes on after a preemption is among the new ones."""
    scheduler.use_v2_model_runner = v2_runner
    prompt = with_runs(scheduler.gem_config.special_token_ids, BLOCK + 8, 250)
    chat = add(scheduler, "chat", prompt, greedy(4))
    first = scheduler.schedule()
    assert first.num_scheduled_tokens == {"chat": 256}
    finish(scheduler, first)
    scheduler.running.remove(chat)
    scheduler._preempt_request(chat, 0.0)
    second = scheduler.schedule()
    assert second.num_scheduled_tokens["chat"] > 0
    assert chat.prefill_stats is not None
    assert chat.prefill_stats.num_prompt_tokens == len(prompt) == BLOCK + 8 + K + 250


def test_the_benchmark_sets_a_cap_and_takes_it_away(scheduler: GemScheduler) -> None:
    add(scheduler, "chat", range(20, 28), greedy(4))
    finish(scheduler, scheduler.schedule())
    for i in range(8):
        add(scheduler, f"text-{i}", range(3 + i, 63 + i), EMBED.clone())
    for cap, tokens in ((8, 1 + 8), (None, 256)):
        bound_texts(scheduler, cap)
        step = scheduler.schedule()
        assert step.num_scheduled_tokens["chat"] == 1
        assert step.total_num_scheduled_tokens == tokens
        finish(scheduler, step)
