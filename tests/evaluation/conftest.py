"""Small tasks of every kind, as files, and an embedder that knows what their texts mean."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gem_vllm.evaluation import run
from gem_vllm.evaluation.options import EvaluateOptions

TOPICS = ("river", "bread", "moon", "library")
MMLU_ROWS = 3


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A file of JSON lines, packed if its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(text.encode()) if file.suffix == ".gz" else text.encode())


class TopicEmbedder:
    """A text's vector counts the topics in it, so that every score can be told in advance."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []

    def embed(self, texts: list[str]) -> np.ndarray:
        self.calls.append(texts)
        counts = [[text.count(topic) for topic in TOPICS] for text in texts]
        return np.array(counts, dtype=np.float32) + 1e-3


@pytest.fixture
def topic_embedder() -> TopicEmbedder:
    return TopicEmbedder()


@pytest.fixture(scope="session")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of every kind, each of which `TopicEmbedder` does without a mistake."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = [
        {"sentence1": "river " * 4, "sentence2": "river " * same + "moon " * (4 - same)}
        for same in range(5)
    ]
    write_rows(
        folder / "Sts" / "dev.jsonl.gz",
        [{**pair, "score": float(same)} for same, pair in enumerate(pairs)],
    )
    write_rows(folder / "Sts" / "train.jsonl", [{**pairs[0], "score": 1.0}])
    write_rows(
        folder / "Pairs" / "test.jsonl",
        [{**pair, "label": int(same > 2)} for same, pair in enumerate(pairs)],
    )
    labelled = [
        {"text": f"{topic} {number}", "label": label}
        for number in range(12)
        for label, topic in enumerate(TOPICS)
    ]
    write_rows(folder / "Classes" / "train.jsonl", labelled)
    write_rows(folder / "Classes" / "test.jsonl", labelled[:20])
    write_rows(folder / "Groups" / "test.jsonl", labelled)
    write_rows(
        folder / "Rerank" / "dev.jsonl",
        [
            {"query": topic, "positive": [f"a {topic}"], "negative": [f"no {other}", "nothing"]}
            for topic, other in zip(TOPICS, TOPICS[::-1], strict=True)
        ],
    )
    documents = [
        {"_id": f"d{i}", "title": topic, "text": f"{topic} {topic}"}
        for i, topic in enumerate(TOPICS)
    ]
    write_rows(folder / "Search" / "corpus.jsonl", documents)
    write_rows(
        folder / "Search" / "queries.jsonl",
        [
            *({"_id": f"q{i}", "text": topic} for i, topic in enumerate(TOPICS)),
            {"_id": "unjudged", "text": "nothing"},
        ],
    )
    write_rows(
        folder / "Search" / "qrels_test.jsonl",
        [{"q": f"q{i}", "d": f"d{i}", "score": 1} for i in range(len(TOPICS))],
    )
    write_rows(
        folder / "Summaries" / "test.jsonl",
        [
            {
                "text": "river river bread",
                "human_summaries": ["river river"],
                "machine_summaries": ["river", "river bread", "moon"],
                "relevance": [5.0, 3.0, 1.0],
            }
        ]
        * 2,
    )
    return folder


@pytest.fixture(scope="session")
def mmlu_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects, five rows each to learn from."""
    folder = tmp_path_factory.mktemp("mmlu")
    for split, count in (("dev", 5), ("test_few", MMLU_ROWS)):
        write_rows(
            folder / f"{split}.jsonl.gz",
            [
                {
                    "subject": subject,
                    "question": f"What is {number}?",
                    "choices": ["one", "two", "three", "four"],
                    "answer": number % 4,
                }
                for subject in ("high_school_counting", "anatomy")
                for number in range(count)
            ],
        )
    return folder


@pytest.fixture(scope="session")
def articles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two articles of WikiText's form."""
    file = tmp_path_factory.mktemp("lm") / "articles.txt"
    file.write_text(
        " \n = The moon = \n \n In 1969 people walked on it . \n \n = = Rock = = \n \n Twenty "
        "kilograms . \n \n = Bread = \n \n Flour , water and salt . \n"
    )
    return file


@pytest.fixture
def served(tasks_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluateOptions:
    """An evaluation of a server, whose vectors are `TopicEmbedder`'s."""
    monkeypatch.setattr(run, "ServerEmbedder", lambda *args: TopicEmbedder())
    return EvaluateOptions(
        out=tmp_path / "out",
        model="gem",
        url="http://localhost:1",
        local=tasks_folder,
        tasks=("Sts",),
    )


@pytest.fixture
def run_cli() -> Callable[..., Any]:
    """`gem-vllm` in this process: its exit code and output."""
    from typer.testing import CliRunner

    from gem_vllm.cli import app

    return lambda *arguments: CliRunner().invoke(app, [str(word) for word in arguments])
