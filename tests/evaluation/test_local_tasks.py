"""Folders of JSON lines become mteb's tasks: right kind, right metric; bad files are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def retrieval(**changes: Any) -> dict:
    """Files of one query, with some values changed in corpus and qrels."""
    files = {
        "corpus.jsonl": {"_id": "1", "title": "moon", "text": "a"},
        "queries.jsonl": {"_id": "1", "text": "a"},
        "qrels_test.jsonl": {"q": "1", "d": "1", "score": 1},
    }
    for row in (files["corpus.jsonl"], files["qrels_test.jsonl"]):
        row |= {name: value for name, value in changes.items() if name in row}
    return {name: [row] for name, row in files.items()}


@pytest.mark.parametrize(("text", "ignores"), [("a", True), ("another", False)])
def test_a_query_that_is_a_document_does_not_find_itself(
    text: str, ignores: bool, tmp_path: Path
) -> None:
    """As in ArguAna; an id that a query shares with another text is by chance."""
    for name, (row,) in retrieval().items():
        changed = {"text": text} if name == "corpus.jsonl" else {}
        write_rows(tmp_path / "Task" / name, [{**row, **changed}])
    assert local_task(tmp_path / "Task").ignore_identical_ids is ignores


def summaries(**changes: Any) -> dict:
    row = {"text": "a", "human_summaries": ["a"], "machine_summaries": ["a", "b"]}
    return {"test.jsonl": [{**row, "relevance": [1.0, 2.0], **changes}]}


def classification(train: list[Any], test: list[Any]) -> dict:
    labels = {"train.jsonl": train, "test.jsonl": test}
    return {name: [{"text": "a", "label": each} for each in some] for name, some in labels.items()}


def pairs(*labels: Any) -> dict:
    return {"test.jsonl": [{"sentence1": "a", "sentence2": "b", "label": each} for each in labels]}


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
        (retrieval(_id=1), "corpus.jsonl, row 1: _id must be a text"),
        (retrieval(title=1), "corpus.jsonl, row 1: title must be a text"),
        (retrieval(q=1), "qrels_test.jsonl, row 1: q must be a text"),
        (retrieval(d=1), "qrels_test.jsonl, row 1: d must be a text"),
        (retrieval(score=1.0), "qrels_test.jsonl, row 1: score must be a whole number"),
        (retrieval(q="9"), "no row with a score over 0 is of a query in queries.jsonl"),
        (retrieval(score=0), "no row with a score over 0 is of a query in queries.jsonl"),
        (summaries(relevance=[1.0]), "row 1: relevance must be as many numbers as machine_summ"),
        (summaries(machine_summaries=[]), "row 1: machine_summaries must be .* at least one"),
        (summaries(human_summaries=[]), "row 1: human_summaries must be .* at least one"),
        (classification([1, 1], [1, 2]), "train.jsonl: has one label alone"),
        (classification([1, "a"], [1]), "some labels are texts, and others numbers"),
        (classification([1, 2], ["a"]), "some labels are texts, and others numbers"),
        (classification([1, 1.5], [1]), "train.jsonl, row 2: label must be a text or a whole"),
        (
            {"test.jsonl": [{"text": "a", "label": 1}, {"text": "b", "label": "b"}]},
            "some labels are texts, and others numbers",
        ),
        (pairs(0, 2), "row 2: label must be 0 or 1"),
        (pairs("0"), "row 1: label must be 0 or 1"),
        (pairs(1), "needs two pairs at least"),
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
