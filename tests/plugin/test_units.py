"""The plugin's parts without an engine: steps, queueing, pooling, start-up checks, metrics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import PoolingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from gem_vllm.config import GemConfig
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.last_layer import LastLayerMLP
from gem_vllm.plugin.metrics import STEP_KINDS, attach_step_counts, take_step_counts
from gem_vllm.plugin.pooler import pool_special_tokens
from gem_vllm.plugin.scheduler import append_special_tokens
from gem_vllm.plugin.step import GemStep


def step_of(embedding: list[int], requests: list[tuple[int, int, int]], k: int) -> GemStep | None:
    """`requests`: prompt length, tokens computed before, tokens computed in this step."""
    lens, computed, scheduled = (np.array(column) for column in zip(*requests, strict=True))
    return GemStep.of_batch(embedding, lens, computed, scheduled, k, torch.device("cpu"))


def test_special_rows_of_a_mixed_batch() -> None:
    # A decoding request, an embedding request in one chunk, one whose run is half computed.
    step = step_of([1, 2], [(9, 12, 1), (10, 0, 10), (20, 18, 2)], k=3)
    assert step is not None
    assert step.rows.tolist() == [8, 9, 10, 11, 12]
    assert step.request_index.tolist() == [1, 1, 1, 2, 2]
    assert step.run_start.tolist() == [7, 7, 7, 17, 17]
    assert step.special_index.tolist() == [0, 1, 2, 1, 2]


def test_a_chunk_before_the_run_has_no_special_rows() -> None:
    assert step_of([0], [(40, 0, 16)], k=4) is None
    assert step_of([], [(9, 0, 9)], k=4) is None


@pytest.mark.parametrize("text_len", [1, 15, 16, 17, 31, 32])
def test_special_tokens_go_behind_the_prompt(text_len: int) -> None:
    init_none_hash(sha256)
    block = 16
    hasher = get_request_block_hasher(block, sha256)

    def request() -> Request:
        ids = list(range(text_len))
        return Request("r", ids, None, PoolingParams(task="embed"), block_hasher=hasher)

    plain, first, second = request(), request(), request()
    for each in (first, second):
        append_special_tokens(each, (900, 901, 902), block)
        assert each.prompt_token_ids == [*range(text_len), 900, 901, 902]
        assert each.num_tokens == each.num_prompt_tokens == text_len + 3
        assert len(each.block_hashes) == (text_len + 3) // block
    text_blocks = text_len // block
    assert (
        first.block_hashes[:text_blocks] == plain.block_hashes == second.block_hashes[:text_blocks]
    )
    assert not set(first.block_hashes[text_blocks:]) & set(second.block_hashes[text_blocks:])


def test_the_last_mlp_computes_the_rows_that_are_read() -> None:
    seen = []

    class MLP(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """As a layer with the adapter: adds 100 at the step's special rows."""
            seen.append(len(x))
            step = gem_step.current()
            y = 2 * x
            if step is not None:
                y[step.rows] += 100
            return y

    mlp, x = LastLayerMLP(MLP()), torch.arange(12.0)[:, None]
    step = step_of([1], [(9, 12, 1), (11, 0, 11)], k=2)
    gem_step.publish(step)
    try:
        every_row = mlp(x)
        mlp.read_rows = torch.tensor([10, 11, 0])
        read = mlp(x)
        assert gem_step.current() is step, "the attention of later layers needs the step's own rows"
    finally:
        gem_step.publish(None)
    assert seen == [12, 3]
    assert torch.equal(read[[0, 10, 11]], every_row[[0, 10, 11]])
    assert read[[10, 11]].flatten().tolist() == [120, 122]
    assert not read[1:10].any()


def test_pooling() -> None:
    states = torch.tensor([[3.0, 0.0, 1.0], [1.0, 4.0, 1.0]], dtype=torch.bfloat16)
    mean = GemConfig((7, 8), pooling="mean", base_model="b")
    concat = GemConfig((7, 8), pooling="concat", base_model="b")
    raw = pool_special_tokens(states, mean, use_activation=False)
    assert raw.dtype == torch.float32
    assert raw.tolist() == [2.0, 2.0, 1.0]
    assert pool_special_tokens(states, mean).tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert pool_special_tokens(states, mean, dimensions=1).tolist() == [1.0]
    assert pool_special_tokens(states, concat, use_activation=False).tolist() == [3, 0, 1, 1, 4, 1]
    batch = torch.stack([states, states.flip(0), 2 * states])
    for config in (mean, concat):
        alone = torch.stack([pool_special_tokens(one, config, dimensions=2) for one in batch])
        assert torch.equal(pool_special_tokens(batch, config, dimensions=2), alone)


def test_step_counts_travel_and_leave_nothing_behind() -> None:
    stats = SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 2})
    attach_step_counts(stats, {"mixed": 3, "embed": 1})
    assert take_step_counts(stats) == {"embed": 1, "mixed": 3}
    assert stats.num_kv_fetch_reqs_by_stage == {"in_progress": 2}
    assert take_step_counts(stats) == {}
    assert set(STEP_KINDS) == {"embed", "generate", "mixed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "pooling", "convert": "embed"}, "one engine embeds and generates"),
        ({"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported"),
        ({"max_model_len": 5}, "leaves no room for text"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "its own scheduler"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "Speculative decoding is not supported",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_at_start(
    options: dict[str, Any], message: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    load_general_plugins()
    folder = str(tiny_checkpoint("llama", k=4))
    with pytest.raises(ValueError, match=message):
        EngineArgs(model=folder, enforce_eager=True, **options).create_engine_config()


def test_the_engine_is_configured(tiny_checkpoint: Callable[..., Path]) -> None:
    load_general_plugins()
    folder = str(tiny_checkpoint("qwen3", k=4, pooling="concat"))
    config = EngineArgs(model=folder, enforce_eager=True).create_engine_config()
    assert config.model_config.runner_type == "generate"
    assert config.model_config.embedding_size == 4 * 64
    assert config.model_config.is_matryoshka
    assert config.model_config.pooler_config.task == "embed"
    assert 0 < config.cache_config.kv_cache_memory_bytes <= 4 << 30
