"""Held-back passages, the sentence-to-paragraph task on them, and its score."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gem_vllm.errors import GemError

Embeddings = NDArray[np.float32]
"""[n, d], rows of length one."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")


@dataclass(frozen=True)
class RetrievalTask:
    """Find the passage a sentence was taken from: query ``i`` belongs to passage ``i``."""

    passages: list[str]
    queries: list[str]


@dataclass(frozen=True)
class RetrievalScore:
    """Shares from 0 to 1."""

    accuracy_at_1: float
    mrr_at_10: float


def load_task(file: Path, *, passages: int, queries: int) -> RetrievalTask:
    """The first ``passages`` lines of ``file``; from each of the first ``queries``, one sentence.

    The sentence is the longest one behind the passage's first, which often names the subject.
    Raises GemError where the file has too few lines.
    """
    texts = read_texts(file)
    if len(texts) < passages:
        raise GemError(f"{file} has {len(texts)} passages; {passages} are needed")
    texts = texts[:passages]
    return RetrievalTask(texts, [_query_of(text) for text in texts[:queries]])


def read_texts(file: Path) -> list[str]:
    """The lines of ``file`` that are not blank; GemError where there is no such file."""
    if not file.is_file():
        raise GemError(f"{file} does not exist; run from the repository's root, or pass --examples")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _query_of(passage: str) -> str:
    first, *others = _SENTENCE_END.split(passage)
    return max(others, key=len, default=first)


def score(queries: Embeddings, passages: Embeddings) -> RetrievalScore:
    """Accuracy@1 and MRR@10 of cosine ranking; among equal scores the right one comes last."""
    similarity = queries @ passages.T
    own = np.take_along_axis(similarity, np.arange(len(queries))[:, None], axis=1)
    rank = (similarity >= own).sum(axis=1)
    return RetrievalScore(
        accuracy_at_1=float((rank == 1).mean()),
        mrr_at_10=float(np.where(rank <= 10, 1 / rank, 0.0).mean()),
    )


def nearest(query: Embeddings, passages: Embeddings, count: int) -> list[tuple[int, float]]:
    """The ``count`` nearest rows of ``passages`` to ``query`` [d]: (row, cosine), best first."""
    similarity = passages @ query
    return [(int(row), float(similarity[row])) for row in np.argsort(-similarity)[:count]]


@dataclass(frozen=True)
class BaseEmbeddings:
    """What the base model makes of the task, and how fast it was."""

    queries: Embeddings
    passages: Embeddings
    tokens_per_second: float


def embed_with_base(folder: Path, task: RetrievalTask, *, max_tokens: int) -> BaseEmbeddings:
    """Mean pooling of the base's last hidden states, float32: the embedding an LLM gives as it is.

    Of a longer text, the first ``max_tokens`` count.
    """
    from transformers.utils.logging import disable_progress_bar

    from gem_vllm.evaluation.mean_pooling import MeanEmbedder

    disable_progress_bar()  # it would break up the status line
    embedder = MeanEmbedder(folder, max_tokens)
    started = time.perf_counter()
    rows = embedder.embed([*task.queries, *task.passages])
    seconds = time.perf_counter() - started
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return BaseEmbeddings(
        queries=rows[: len(task.queries)],
        passages=rows[len(task.queries) :],
        tokens_per_second=embedder.tokens / seconds,
    )
