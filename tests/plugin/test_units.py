"""The plugin's parts without an engine: steps, queueing, pooling, start-up checks, metrics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from prometheus_client import REGISTRY
from vllm import PoolingParams
from vllm.config import ParallelConfig, PoolerConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats
from vllm.v1.request import Request

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.config import WORKER, GemModelConfig
from gem_vllm.plugin.last_layer import LastLayerMLP, ReadRows
from gem_vllm.plugin.metrics import (
    STEP_KINDS,
    GemStatLogger,
    attach_step_counts,
    take_step_counts,
)
from gem_vllm.plugin.pooler import pool_special_tokens
from gem_vllm.plugin.runner import GemModelRunner
from gem_vllm.plugin.runner_mixin import GemRunner
from gem_vllm.plugin.runner_v2 import GemModelRunnerV2
from gem_vllm.plugin.scheduler import append_special_tokens
from gem_vllm.plugin.validation import check_prompt, check_request
from tests.imports import imported
from tests.plugin.steps import SPECIAL, step_of


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

    mlp, x = MLP(), torch.arange(12.0)[:, None]
    LastLayerMLP.enable(mlp)
    step = step_of({1}, (list(range(9)), 12, 1), ([*range(8), *SPECIAL], 0, 11))
    gem_step.publish(step)
    try:
        every_row = mlp(x)
        mlp.read_rows = ReadRows.of_step(step, np.array([0, 11]), x.device)
        read = mlp(x)
        assert gem_step.current() is step, "the attention of later layers needs the step's own rows"
    finally:
        gem_step.publish(None)
    assert seen == [12, 4]
    assert torch.equal(read[[0, 9, 10, 11]], every_row[[0, 9, 10, 11]])
    assert read[[9, 10, 11]].flatten().tolist() == [118, 120, 122]
    assert not read[1:9].any()


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
    stats = SchedulerStats(waiting_lora_adapters={"shakespeare": 2})
    attach_step_counts(stats, {"mixed": 3, "embed": 1})
    assert take_step_counts(stats) == {"embed": 1, "mixed": 3}
    assert stats.waiting_lora_adapters == {"shakespeare": 2}
    assert take_step_counts(stats) == {}
    assert set(STEP_KINDS) == {"embed", "generate", "mixed"}


def test_metrics_outside_of_ray_leave_ray_serve_out_of_the_start() -> None:
    code = "from gem_vllm.plugin.metrics import _Metrics; _Metrics.of_process()"
    assert imported(code, "ray.serve") == []


@pytest.mark.parametrize("worker", [WORKER, "vllm.v1.worker.cpu_worker.CPUWorker"])
def test_engines_of_other_models_are_not_counted(worker: str) -> None:
    logger = GemStatLogger(VllmConfig(parallel_config=ParallelConfig(worker_cls=worker)), 7)
    counted = "gem_generation_tokens_total", {"engine": "7"}
    before = REGISTRY.get_sample_value(*counted) or 0
    stats = IterationStats()
    stats.finished_requests = [
        FinishedRequestStats(FinishReason.STOP, num_generation_tokens=3, max_tokens_param=3)
    ]
    logger.record(SchedulerStats(), stats)
    after = REGISTRY.get_sample_value(*counted) or 0
    assert after - before == (3 if worker == WORKER else 0)


def test_metrics_are_of_the_task_and_the_kind_that_they_name() -> None:
    """All numbers differ, so that none can stand for another."""
    logger = GemStatLogger(VllmConfig(parallel_config=ParallelConfig(worker_cls=WORKER)), 8)
    steps = {"embed": 2, "generate": 5, "mixed": 11}
    scheduler_stats, stats = SchedulerStats(), IterationStats()
    attach_step_counts(scheduler_stats, steps)
    stats.finished_requests = [
        FinishedRequestStats(
            FinishReason.STOP, queued_time=0.25, e2e_latency=0.5, num_prompt_tokens=7
        ),
        FinishedRequestStats(
            FinishReason.LENGTH,
            queued_time=2.0,
            e2e_latency=4.0,
            num_prompt_tokens=100,
            num_generation_tokens=30,
            max_tokens_param=32,
        ),
    ]
    logger.record(scheduler_stats, stats)

    def read(name: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(name, {**labels, "engine": "8"})

    for task, queued, latency, tokens in (("embed", 0.25, 0.5, 7), ("generate", 2.0, 4.0, 100)):
        assert read("gem_queue_seconds_sum", task=task) == queued
        assert read("gem_latency_seconds_sum", task=task) == latency
        assert read("gem_prompt_tokens_total", task=task) == tokens
        for name in ("gem_queue_seconds_count", "gem_latency_seconds_count"):
            assert read(name, task=task) == 1
    assert read("gem_generation_tokens_total") == 30
    assert {kind: read("gem_steps_total", kind=kind) for kind in STEP_KINDS} == steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "pooling", "convert": "embed"}, "one engine embeds and generates"),
        ({"additional_config": {"gem_tokens_beside_chat": 0}}, "is 0; give the number of prompt"),
        ({"additional_config": {"gem_tokens_beside_chat": "9"}}, "is '9'; give the number"),
        (
            {
                "additional_config": {"gem_tokens_beside_chat": 9},
                "enable_chunked_prefill": False,
                "max_model_len": 64,
            },
            "Leave one of --no-enable-chunked-prefill and it out",
        ),
        ({"max_model_len": 5}, "leaves no room for text"),
        ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "Leave --worker-cls unset"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "its own scheduler"),
        (
            {"pooler_config": PoolerConfig(task="embed")},
            "Leave --pooler-config unset",
        ),
        ({"enable_batch_sharded_sampling": True}, "Leave --enable-batch-sharded-sampling unset"),
        ({"enable_dbo": True}, "Leave --enable-dbo"),
        ({"enable_prompt_embeds": True}, "Leave --enable-prompt-embeds unset"),
        ({"skip_tokenizer_init": True}, "Leave --skip-tokenizer-init and --tokens-only unset"),
        ({"tokens_only": True}, "Leave --skip-tokenizer-init and --tokens-only unset"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size unset"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "Leave --kv-transfer-config",
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


def test_an_adapter_elsewhere_than_in_a_folder_or_on_the_hub_is_refused(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`models` reads it from one of these; weights vLLM finds in other places, too."""
    load_general_plugins()
    folder = tiny_checkpoint("llama", k=4)
    config = EngineArgs(model=str(folder), enforce_eager=True).create_engine_config()
    config.model_config.pooler_config = None  # as it was before it was set
    config.model_config.model_weights = "s3://bucket/model"
    with pytest.raises(ValueError, match="Download s3://bucket/model, and serve that folder"):
        GemModelConfig.verify_and_update_config(config)
    config.model_config.model_weights = ""
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "1")
    GemModelConfig.verify_and_update_config(config)
    config.model_config.model = "owner/name"
    with pytest.raises(ValueError, match="Download owner/name, and serve that folder"):
        GemModelConfig.verify_and_update_config(config)


def test_input_types_are_coheres_or_those_that_have_prompts(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    load_general_plugins()
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("llama", k=4), folder)

    def instructions() -> dict[str, str] | None:
        config = EngineArgs(model=str(folder), enforce_eager=True).create_engine_config()
        return getattr(config.model_config.hf_config, "task_instructions", None)

    assert instructions() == dict.fromkeys(
        ("search_document", "search_query", "classification", "clustering"), ""
    )
    prompts = folder / "config_sentence_transformers.json"
    prompts.write_text(json.dumps({"prompts": {"query": "Question: "}}))
    assert instructions() is None  # vLLM reads that file


def test_the_engine_is_configured(tiny_checkpoint: Callable[..., Path]) -> None:
    load_general_plugins()
    folder = str(tiny_checkpoint("qwen3", k=4, pooling="concat"))
    config = EngineArgs(model=folder, enforce_eager=True).create_engine_config()
    assert config.model_config.runner_type == "generate"
    assert config.model_config.embedding_size == 4 * 64
    assert config.model_config.is_matryoshka
    assert config.model_config.pooler_config.task == "embed"
    assert 0 < config.cache_config.kv_cache_memory_bytes <= 4 << 30


def test_full_graphs_are_kept(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler config would cost them, were it there when vLLM chooses (as on CUDA it does)."""
    load_general_plugins()
    platform = type(current_platform)
    monkeypatch.setattr(platform, "support_static_graph_mode", classmethod(lambda cls: True))
    monkeypatch.setattr(platform, "check_and_update_config", classmethod(lambda cls, config: None))
    args = EngineArgs(
        model=str(tiny_checkpoint("llama", k=4)),
        compilation_config={"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE"},
    )
    config = args.create_engine_config()
    assert config.compilation_config.cudagraph_mode.name == "FULL_AND_PIECEWISE"
    assert config.model_config.pooler_config.task == "embed"


def test_the_workers_of_a_cpu_share_what_the_kv_cache_gets(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_general_plugins()
    folder = str(tiny_checkpoint("llama", k=4))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Mock(available=3 << 30))
    for options, workers in (
        ({}, 1),
        ({"pipeline_parallel_size": 2}, 2),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, 4),
    ):
        config = EngineArgs(model=folder, enforce_eager=True, **options).create_engine_config()
        assert config.cache_config.kv_cache_memory_bytes == (3 << 29) // workers


@pytest.mark.parametrize(
    ("mixin", "method"),
    [(GemModelRunner, "_prepare_inputs"), (GemModelRunnerV2, "gather_batch_req_state")],
)
def test_a_runner_that_lacks_what_is_overridden_is_refused(mixin: Any, method: str) -> None:
    names = {*vars(mixin), *vars(GemRunner)} - {method}
    runner = type("MovedRunner", (), dict.fromkeys(names - {"__dict__", "__weakref__"}))()
    with pytest.raises(GemError, match=f"MovedRunner has no {method}"):
        mixin.enable(runner, GemConfig(SPECIAL, pooling="mean", base_model="b"))


def test_a_trace_to_follow_has_no_special_tokens() -> None:
    """They would be computed as ordinary tokens, and found by their ids in the prefix cache."""
    gem_config = GemConfig((500, 501), "mean", "adapter", "base")
    limits: dict[str, Any] = {"max_model_len": 64, "block_size": 16, "from_text": False}
    check_prompt(
        [5, 6], Mock(trace_decode_token_ids=[7], allowed_token_ids=None), gem_config, **limits
    )
    with pytest.raises(VLLMValidationError, match="trace_decode_token_ids names GEM special"):
        check_prompt([5, 6], Mock(trace_decode_token_ids=[7, 501]), gem_config, **limits)


@pytest.mark.parametrize("option", ["prompt_logprobs", "prompt_logprob_token_ids"])
def test_what_is_told_of_prompt_tokens_is_not_for_runs(option: str) -> None:
    gem_config = GemConfig((500, 501), "mean", "adapter", "base")
    limits: dict[str, Any] = {"max_model_len": 64, "block_size": 16, "from_text": False}
    options = SimpleNamespace(**{option: [7]})
    assert check_prompt([5, 6], options, gem_config, **limits) == 2
    with pytest.raises(VLLMValidationError, match=f"^{option} is not for a prompt with special"):
        check_prompt([5, 500, 501, 6], options, gem_config, **limits)


def test_a_prompt_in_parts_has_no_runs() -> None:
    gem_config = GemConfig((500, 501), "mean", "adapter", "base")
    limits: dict[str, Any] = {"max_model_len": 64, "block_size": 16, "from_text": False}

    def request(prompt: list[int], resumable: bool) -> SimpleNamespace:
        return SimpleNamespace(
            prompt_token_ids=prompt,
            sampling_params=SimpleNamespace(),
            pooling_params=None,
            resumable=resumable,
        )

    with_run = [5, 500, 501, 6]
    check_request(request([5, 6], True), gem_config, **limits)
    check_request(request(with_run, False), gem_config, **limits)
    with pytest.raises(VLLMValidationError, match="that is sent in parts cannot have special"):
        check_request(request(with_run, True), gem_config, **limits)
