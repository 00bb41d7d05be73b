"""vLLM engines in the test's own process: one starts in seconds, and no two live at once."""

from __future__ import annotations

import os

# Before vLLM is imported: one process, no pinning of threads to cores that other tests use too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, PoolingParams, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import _cached_get_attn_backend

from gem_vllm.plugin import models

EMBED = PoolingParams(task="embed")


def is_interpreted() -> bool:
    """Whether Triton's kernels are run by its interpreter, line by line (`test_runner_v2`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def attending_by(backend: str) -> Iterator[None]:
    """Models that are loaded from here on attend by this class, named as an import path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            models,
            "register_attention",
            lambda: registry.register_backend(AttentionBackendEnum.CPU_ATTN, backend),
        )
        yield
    forget_backends()


def forget_backends() -> None:
    """Plain models that are loaded next attend as in a process without GEM models."""
    for backend in AttentionBackendEnum:
        backend.clear_override()
    _cached_get_attn_backend.cache_clear()


@contextmanager
def running_engine(folder: Path | str, **options: Any) -> Iterator[LLM]:
    """An in-process `LLM` over `folder`, in float32 and eager unless `options` say otherwise."""
    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 1 << 27,
        "distributed_executor_backend": "uni",
        "seed": 0,
    }
    if current_platform.is_cuda_alike():
        # What else runs on the GPU leaves too little for vLLM's default.
        defaults["gpu_memory_utilization"] = 0.1
    options = {**defaults, **options}
    if current_platform.is_cuda_alike() and options["dtype"] == "float32":
        pytest.skip("FlashAttention has no float32; `make test-gpu` tests what it has")
    with collecting_what_is_new():
        llm = LLM(str(folder), **options)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()
            gc.collect()


@contextmanager
def collecting_what_is_new() -> Iterator[None]:
    """Garbage is looked for only among what is made from here on.

    vLLM collects many times from an engine's start to its end, each time over all that the tests
    have imported, and thaws what is frozen.
    """
    gc.freeze()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("freeze", "unfreeze"):
                patch.setattr(gc, name, lambda: None)
            yield
    finally:
        gc.unfreeze()


def embed(llm: LLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [n, d]: the engine's embeddings of prompts given as token ids."""
    outputs = llm.embed([{"prompt_token_ids": list(ids)} for ids in prompts], use_tqdm=False)
    return torch.tensor([output.outputs.embedding for output in outputs])


def run_together(
    llm: LLM, requests: dict[str, tuple[Sequence[int], SamplingParams | PoolingParams]]
) -> dict[str, Any]:
    """Add all requests, named by their keys, then step until all are done; their final outputs."""
    engine = llm.llm_engine
    for name, (prompt, params) in requests.items():
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
    outputs = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[output.request_id] = output
    return outputs


def named(
    kind: str, prompts: Sequence[Sequence[int]], params: SamplingParams | PoolingParams
) -> dict[str, tuple[Sequence[int], SamplingParams | PoolingParams]]:
    """Requests for `run_together`: "kind-0", "kind-1", … in the order of `prompts`."""
    return {f"{kind}-{i}": (prompt, params) for i, prompt in enumerate(prompts)}


def embeddings_of(outputs: dict[str, Any], count: int) -> torch.Tensor:
    """float32 [count, d]: what `run_together` gave for `named("text", …)`, in its order."""
    return torch.stack([outputs[f"text-{i}"].outputs.data for i in range(count)])


def scheduler_of(llm: LLM) -> Any:
    """The scheduler of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def step_counts(llm: LLM) -> dict[str, int]:
    """Engine steps so far by kind, from the scheduler of an in-process engine."""
    return dict(scheduler_of(llm)._step_counts)


def drafted_and_accepted(llm: LLM) -> tuple[int, int]:
    """Tokens that an engine has speculated so far, and those that came true."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return (
        counts["vllm:spec_decode_num_draft_tokens"],
        counts["vllm:spec_decode_num_accepted_tokens"],
    )


def free_blocks(llm: LLM) -> int:
    """KV blocks of an in-process engine that no request holds."""
    return scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def noted_preemptions(llm: LLM) -> list[str]:
    """A list that gets the id of every request that an in-process engine preempts from now on."""
    scheduler = scheduler_of(llm)
    preempt, preempted = scheduler._preempt_request, list[str]()

    def noted(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = noted
    return preempted


def random_prompts(lengths: Sequence[int], vocab: int = 400, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, of token ids 3 to `vocab` - 1."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=random).tolist() for n in lengths]


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float64 [n]: cosine of each row of `a` with the same row of `b`."""
    return torch.nn.functional.cosine_similarity(a.double(), b.double())
