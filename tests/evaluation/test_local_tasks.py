"""Folders of JSON lines become mteb's tasks: right kind, right metric; bad files are refused."""

from __future__ import annotations

from pathlib import Path

import mteb
import pytest

from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import GemEncoder
from gem_vllm.evaluation.local_tasks import find_tasks, local_task
from tests.evaluation.conftest import TopicEmbedder, write_rows

KINDS = {
    "Classes": ("Classification", "accuracy", "test"),
    "Groups": ("Clustering", "v_measure", "test"),
    "Pairs": ("PairClassification", "cosine_ap", "test"),
    "Rerank": ("Reranking", "map_at_1000", "dev"),
    "Search": ("Retrieval", "ndcg_at_10", "test"),
    "Sts": ("STS", "cosine_spearman", "dev"),
    "Summaries": ("Summarization", "cosine_spearman", "test"),
}


def score(task, embedder) -> float:
    encoder = GemEncoder(embedder, "topics", "1")
    results = mteb.evaluate(encoder, task, cache=None, co2_tracker=False)
    return results.task_results[0].main_score


def test_every_task_is_found(tasks_folder: Path) -> None:
    assert list(find_tasks(tasks_folder)) == sorted(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_kind_split_and_score(name: str, tasks_folder: Path, topic_embedder: TopicEmbedder) -> None:
    task = local_task(tasks_folder / name)
    kind, metric, split = KINDS[name]
    assert (task.metadata.type, task.metadata.main_score) == (kind, metric)
    assert list(task.eval_splits) == [split]
    assert score(task, topic_embedder) == pytest.approx(1.0, abs=1e-6)


def test_a_limit_takes_rows_evenly_spread(tasks_folder: Path) -> None:
    sts = local_task(tasks_folder / "Sts", limit=3).dataset["default"]["dev"]
    assert sts["score"] == [0.0, 1.0, 3.0]
    search = local_task(tasks_folder / "Search", limit=2).dataset["default"]["test"]
    assert search["queries"]["id"] == ["q0", "q2"]
    assert len(search["corpus"]) == 4
    assert set(search["relevant_docs"]) == {"q0", "q2"}


def test_a_limit_that_leaves_no_difference_is_named(tasks_folder: Path) -> None:
    with pytest.raises(GemError, match=r"of 1 scores none differs.* a greater --limit"):
        local_task(tasks_folder / "Sts", limit=1)


def test_a_row_with_nothing_to_tell_apart_is_left_out(tmp_path: Path) -> None:
    row = {"query": "moon", "positive": ["a moon"], "negative": ["bread"]}
    write_rows(tmp_path / "Task" / "test.jsonl", [row, {**row, "negative": []}])
    queries = local_task(tmp_path / "Task").dataset["default"]["test"]["queries"]
    assert len(queries) == 1


def test_the_revision_is_of_the_data(tmp_path: Path) -> None:
    revisions = set()
    for score_ in (1.0, 2.0):
        rows = [{"sentence1": "a", "sentence2": "b", "score": value} for value in (0.0, score_)]
        write_rows(tmp_path / "Task" / "test.jsonl", rows)
        revisions.add(local_task(tmp_path / "Task").metadata.revision)
    assert len(revisions) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test.jsonl": [{"sentence1": "a"}]}, "one of these sets of fields"),
        ({"test.jsonl": []}, "is empty"),
        ({"test.jsonl": ["text"]}, "expected an object"),
        (
            {"test.jsonl": [{"text": "a", "label": 1}, {"text": "b"}]},
            r"test.jsonl, row 2: lacks label",
        ),
        (
            {"test.jsonl": [{"sentence1": "a", "sentence2": "b", "score": 1}] * 2},
            "of 2 scores none differs",
        ),
        (
            {"test.jsonl": [{"sentence1": "a", "sentence2": "b", "score": None}]},
            "row 1: score must be a number",
        ),
        (
            {"test.jsonl": [{"query": "a", "positive": ["b"], "negative": []}]},
            "no row has both positive and negative",
        ),
        ({"train.jsonl": [{"text": "a", "label": 1}]}, "another split beside train"),
        ({"corpus.jsonl": [{"_id": "1", "text": "a"}]}, "needs queries and qrels_SPLIT"),
    ],
)
def test_bad_files_are_refused(files: dict, message: str, tmp_path: Path) -> None:
    for name, rows in files.items():
        write_rows(tmp_path / "Task" / name, rows)
    with pytest.raises(GemError, match=message):
        local_task(tmp_path / "Task")


def test_a_folder_without_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(GemError, match="holds no task"):
        find_tasks(tmp_path)
    with pytest.raises(GemError, match="is not a folder"):
        find_tasks(tmp_path / "missing")
