"""vLLM's V2 model runner, the default on CUDA: the engine's tests once more, in a process with it.

Its Triton kernels run on a CPU under Triton's interpreter (`triton_on_cpu`).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of a whole file on a slow machine; what takes longer hangs.
SECONDS = 3600
CHOSEN = [
    "test_agreement.py::test_float32_alone_and_mixed[llama-4]",
    "test_agreement.py::test_concat_dimensions_and_raw_pooling",
    "test_agreement.py::test_special_tokens_across_chunks[4]",
    "test_agreement.py::test_prefix_cache_hits_end_with_the_text",
    "test_agreement.py::test_preempted_embeddings_come_out_right",
    "test_behind_runs.py::test_generation_behind_runs[gemma3-4]",
    "test_behind_runs.py::test_texts_with_runs_in_them_are_embedded",
    "test_conformance.py::test_any_option[few tokens beside chat]",
    "test_conformance.py::test_any_option[LoRAs]",
    "test_flash_attention.py::test_embeddings_and_generation_behind_runs[4-llama]",
    "test_flex_attention.py::test_embeddings_and_generation_behind_runs[llama]",
    "test_parallel.py::test_two_workers[pipeline, chunks and few KV blocks]",
    "test_speculative.py::test_by_a_draft[eagle3]",
    "test_speculative.py::test_sampled_tokens[greedy]",
    "test_speculative.py::test_sampled_tokens[probabilistic]",
]
WHOLE = [
    "test_agreement.py",
    "test_behind_runs.py",
    "test_compress.py",
    "test_conformance.py",
    "test_flash_attention.py",
    "test_flex_attention.py",
    "test_generation.py",
    "test_parallel.py",
    "test_speculative.py",
]
# What the interpreter cannot run of vLLM's own kernels, or not in minutes.
NOT_INTERPRETED = [
    "test_special_tokens_are_never_generated[top_k]",
    "test_special_tokens_are_never_generated[top_p]",
    "test_special_tokens_are_never_generated[penalties]",
]


def run_on_v2(tests: list[str], *options: str) -> int:
    """Run tests of this folder in a process whose engines have the V2 runner; how many passed."""
    paths = [str(Path(__file__).parent / "triton_on_cpu"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--show-capture=no",
            "--disable-warnings",
            *options,
            *tests,
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


def test_engine() -> None:
    assert run_on_v2([f"tests/plugin/{test}" for test in CHOSEN]) == len(CHOSEN)


@pytest.mark.slow
@pytest.mark.parametrize("file", WHOLE)
def test_engine_whole(file: str) -> None:
    deselected = [f"--deselect=tests/plugin/{file}::{name}" for name in NOT_INTERPRETED]
    assert run_on_v2([f"tests/plugin/{file}"], *deselected) > 0
