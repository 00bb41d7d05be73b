"""Random requests for minutes: every output right, nothing left and nothing grown at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import EMBED, run_together, running_engine
from tests.plugin.random_load import RandomLoad, check, run_load
from tests.plugin.test_conformance import LIMIT, held

SECONDS = float(os.environ.get("GEM_SOAK_SECONDS", "600"))
ROUND = 100
GROWTH_MIB = 50


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 4])
def test_soak(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    """Out of few KV blocks, in small chunks, with requests given up: for half of the time each."""
    folder = tiny_checkpoint("llama", k=k)
    reference = ReferenceEmbedder(folder)
    process, end = psutil.Process(), time.monotonic() + SECONDS / 2
    sizes: list[float] = []
    with running_engine(
        folder, max_model_len=LIMIT, max_num_batched_tokens=128, num_gpu_blocks_override=80
    ) as llm:
        run_together(llm, {"first": ([5, 6], EMBED)})
        before = held(llm)
        while time.monotonic() < end or len(sizes) < 4:
            load = RandomLoad(reference, LIMIT, seed=len(sizes), abort_share=0.1)
            done = run_load(llm, load, ROUND, at_once=[1, 16, 128][len(sizes) % 3])
            check(reference, done)
            run_together(llm, {"last": ([5, 6], EMBED)})
            assert held(llm) == before, f"seed {load.seed}"
            sizes.append(process.memory_info().rss / (1 << 20))
    # What the first rounds bring in, caches and code, is not growth.
    assert sizes[-1] - sizes[len(sizes) // 2] < GROWTH_MIB, sizes
