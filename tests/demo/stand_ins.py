"""The demo with a stand-in for training and one for vLLM; light enough for a process of its own."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest

from gem_vllm import machine
from gem_vllm.demo import run, server
from gem_vllm.demo.retrieval import BaseEmbeddings, RetrievalTask

FAKE_VLLM = str(Path(__file__).with_name("fake_vllm.py"))
TRAIN = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.mkdir()
for mark in sys.argv[2:]:
    (out / mark).touch()
time.sleep(600 if "train-for-ever" in sys.argv else 0)
"""


def stand_ins(patch: pytest.MonkeyPatch, work: Path, marks: list[str]) -> None:
    """The base is ``work/base``; training makes a checkpoint that holds the empty files ``marks``.

    `fake_vllm` says what they mean; ``train-for-ever`` is for the training itself.
    """
    real_group = run.process_group

    def train(command: list[str]) -> AbstractContextManager[Popen[bytes]]:
        out = command[command.index("--out") + 1]
        return real_group([sys.executable, "-c", TRAIN, out, *marks])

    patch.setattr(run, "fetch_model", lambda name, folder: work / "base")
    patch.setattr(run, "PASSAGES", 40)
    patch.setattr(run, "QUERIES", 10)
    patch.setattr(run, "process_group", train)
    fake_vllm(patch)


def fake_vllm(patch: pytest.MonkeyPatch) -> None:
    """``vllm serve`` is the script ``fake_vllm.py``."""

    def command(checkpoint: Path, port: int) -> list[str]:
        return [sys.executable, FAKE_VLLM, "serve", str(checkpoint), "--port", str(port)]

    patch.setattr(server, "serve_command", command)


def without_a_model(patch: pytest.MonkeyPatch) -> None:
    """No torch: random embeddings of the base, and a machine without CUDA."""

    def embed(base: Path, task: RetrievalTask, *, max_tokens: int) -> BaseEmbeddings:
        rows = np.random.default_rng(0).normal(size=(len(task.passages), 8)).astype(np.float32)
        return BaseEmbeddings(rows[: len(task.queries)], rows, tokens_per_second=100.0)

    patch.setattr(run, "embed_with_base", embed)
    patch.setattr(machine, "has_cuda", lambda: False)
