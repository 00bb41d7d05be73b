"""Tasks from a folder of JSON lines, each run with mteb's own class for its kind and its metric.

A folder with one of these is a task; its name is the folder's:

| kind | files | fields |
|---|---|---|
| STS | one | sentence1, sentence2, score |
| PairClassification | one | sentence1, sentence2, label (0 or 1) |
| Classification | train and another | text, label |
| Clustering | one | text, label |
| Reranking | one | query, positive, negative (lists; a row with an empty one is left out) |
| Summarization | one | text, human_summaries, machine_summaries, relevance (lists) |
| Retrieval | corpus, queries, qrels_SPLIT | _id, title, text; _id, text; q, d, score |

Files are .jsonl or .jsonl.gz, named by their split; of several, test is used, else dev, else
validation, else the first that is not train. Labels are texts or whole numbers, ids are texts; a
score of retrieval is a whole number, over 0 for what is relevant.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTask
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.text.summarization import AbsTaskSummarization

from gem_vllm.errors import GemError
from gem_vllm.evaluation.local_rows import (
    FIELDS,
    RETRIEVAL_FIELDS,
    Row,
    check_labels,
    check_relevance,
    check_rows,
    kind_of,
    read_rows,
)
from gem_vllm.folders import content_sha256
from gem_vllm.training.data import is_jsonl

SPLIT_ORDER = ("test", "dev", "validation", "train")
MAIN_SCORES = {
    "STS": "cosine_spearman",
    "PairClassification": "cosine_ap",
    "Reranking": "map_at_1000",
    "Summarization": "cosine_spearman",
    "Classification": "accuracy",
    "Clustering": "v_measure",
    "Retrieval": "ndcg_at_10",
}


def find_tasks(folder: Path) -> dict[str, Path]:
    """The tasks in a folder, by name, in alphabetical order.

    Raises GemError where there is none.
    """
    if not folder.is_dir():
        raise GemError(f"--local {folder} is not a folder; name one that holds a folder per task")
    tasks = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _files(path)}
    if not tasks:
        raise GemError(f"--local {folder} holds no task: a folder with .jsonl or .jsonl.gz files")
    return tasks


def local_task(folder: Path, limit: int | None = None) -> AbsTask:
    """The task in a folder; with ``limit``, of so many of its rows or queries, evenly spread.

    Raises GemError, with file and line, for what is no task of a kind that is known.
    """
    files = _files(folder)
    if "corpus" in files:
        return _retrieval(folder, files, limit)
    split = _split(files)
    rows = read_rows(files[split])
    kind = kind_of(files[split], rows)
    if kind == "Classification" and "train" not in files:
        kind = "Clustering"
    elif kind == "Classification" and split == "train":
        raise GemError(f"{folder}: classification needs another split beside train")
    if kind == "Reranking":
        rows = _with_both(files[split], rows)
    if kind == "Summarization":
        check_relevance(files[split], rows)
    rows = _spread(rows, limit)
    if kind == "Reranking":
        return _make(AbsTaskRetrieval, kind, folder, split, {split: _reranking(rows)})
    return _SIMPLE[kind](folder, split, rows, files)


def _sts(folder: Path, split: str, rows: list[Row], files: dict[str, Path]) -> AbsTask:
    bounds = _bounds(folder, [row["score"] for row in rows])
    return _make(AbsTaskSTS, "STS", folder, split, {split: _dataset(rows, FIELDS["STS"])}, **bounds)


def _pairs(folder: Path, split: str, rows: list[Row], files: dict[str, Path]) -> AbsTask:
    if len(rows) == 1:  # which mteb takes for all rows in one
        raise GemError(f"{folder}: needs two pairs at least; give more, or a greater --limit")
    data = {split: _dataset(rows, FIELDS["PairClassification"])}
    columns = {
        "input1_column_name": "sentence1",
        "input2_column_name": "sentence2",
        "label_column_name": "label",
    }
    return _make(AbsTaskPairClassification, "PairClassification", folder, split, data, **columns)


def _classification(folder: Path, split: str, rows: list[Row], files: dict[str, Path]) -> AbsTask:
    train = read_rows(files["train"])
    check_rows(files["train"], train, FIELDS["Classification"])
    check_labels(folder, [*train, *rows])
    if len({row["label"] for row in train}) == 1:
        raise GemError(f"{files['train']}: has one label alone; classification needs two at least")
    data = {
        "train": _dataset(train, FIELDS["Classification"]),
        split: _dataset(rows, FIELDS["Classification"]),
    }
    return _make(AbsTaskClassification, "Classification", folder, split, data)


def _clustering(folder: Path, split: str, rows: list[Row], files: dict[str, Path]) -> AbsTask:
    """One set of all texts, as mteb's clustering tasks of its first version have several."""
    check_labels(folder, rows)
    whole = {
        "sentences": [[row["text"] for row in rows]],
        "labels": [[row["label"] for row in rows]],
    }
    data = {split: Dataset.from_dict(whole)}
    return _make(AbsTaskClusteringLegacy, "Clustering", folder, split, data)


def _summarization(folder: Path, split: str, rows: list[Row], files: dict[str, Path]) -> AbsTask:
    bounds = _bounds(folder, [score for row in rows for score in row["relevance"]])
    data = {split: _dataset(rows, FIELDS["Summarization"])}
    return _make(AbsTaskSummarization, "Summarization", folder, split, data, **bounds)


_SIMPLE = {
    "STS": _sts,
    "PairClassification": _pairs,
    "Classification": _classification,
    "Clustering": _clustering,
    "Summarization": _summarization,
}


def _bounds(folder: Path, scores: list[float]) -> dict[str, float]:
    """What mteb's classes scale scores by."""
    if len(set(scores)) < 2:
        raise GemError(
            f"{folder}: of {len(scores)} scores none differs from the others; give rows with "
            "different ones, or a greater --limit"
        )
    return {"min_score": min(scores), "max_score": max(scores)}


def _with_both(file: Path, rows: list[Row]) -> list[Row]:
    """The rows with something to tell apart; mteb's own tasks leave out the others too."""
    if not (rows := [row for row in rows if row["positive"] and row["negative"]]):
        raise GemError(f"{file}: no row has both positive and negative texts")
    return rows


def _reranking(rows: list[Row]) -> Any:
    """Each query with its own candidates, as mteb's reranking tasks are: retrieval among those."""
    corpus: list[Row] = []
    queries: list[Row] = []
    relevant: dict[str, dict[str, int]] = {}
    candidates: dict[str, list[str]] = {}
    for number, row in enumerate(rows):
        query = f"q{number}"
        queries.append({"id": query, "text": row["query"]})
        relevant[query], candidates[query] = {}, []
        for score, texts in ((1, row["positive"]), (0, row["negative"])):
            for text in texts:
                document = f"d{len(corpus)}"
                corpus.append({"id": document, "title": "", "text": text})
                relevant[query][document] = score
                candidates[query].append(document)
    return _split_data(corpus, queries, relevant, candidates)


def _retrieval(folder: Path, files: dict[str, Path], limit: int | None) -> AbsTask:
    judged = {name.removeprefix("qrels_"): name for name in files if name.startswith("qrels_")}
    if "queries" not in files or not judged:
        raise GemError(f"{folder}: retrieval needs queries and qrels_SPLIT beside corpus")
    split = _split(judged)
    found = {}
    for name, fields in RETRIEVAL_FIELDS.items():
        file = files[judged[split] if name == "qrels" else name]
        found[name] = [{"title": None, **row} for row in read_rows(file)]  # it may be lacking
        check_rows(file, found[name], fields)
    relevant: dict[str, dict[str, int]] = {}
    for row in found["qrels"]:
        relevant.setdefault(row["q"], {})[row["d"]] = row["score"]
    queries = [
        row
        for row in found["queries"]
        if any(score > 0 for score in relevant.get(row["_id"], {}).values())
    ]
    if not queries:
        raise GemError(
            f"{files[judged[split]]}: no row with a score over 0 is of a query in "
            f"{files['queries'].name}"
        )
    queries = _spread(queries, limit)
    data = _split_data(
        [
            {"id": row["_id"], "title": row["title"] or "", "text": row["text"]}
            for row in found["corpus"]
        ],
        [{"id": row["_id"], "text": row["text"]} for row in queries],
        {row["_id"]: relevant[row["_id"]] for row in queries},
        None,
    )
    texts = {row["_id"]: row["text"] for row in found["corpus"]}
    return _make(
        AbsTaskRetrieval,
        "Retrieval",
        folder,
        split,
        {split: data},
        # Queries that are documents (ArguAna's, say) are not to find themselves. Ids alone may
        # agree by chance, where both are numbers.
        ignore_identical_ids=any(texts.get(row["_id"]) == row["text"] for row in queries),
    )


def _split_data(
    corpus: list[Row],
    queries: list[Row],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> Any:
    return {
        "corpus": Dataset.from_list(corpus),
        "queries": Dataset.from_list(queries),
        "relevant_docs": relevant,
        "top_ranked": candidates,
    }


def _make(
    base: type[AbsTask],
    kind: str,
    folder: Path,
    split: str,
    data: dict[str, Any],
    **attributes: Any,
) -> AbsTask:
    """A task of mteb's whose data is here already."""
    metadata = TaskMetadata(
        name=folder.name,
        description=f"{kind} from a local folder.",
        type=kind,
        dataset={"path": folder.name, "revision": content_sha256(folder)},
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score=MAIN_SCORES[kind],
    )
    task = type(folder.name, (base,), {"metadata": metadata, **attributes})()
    task.dataset = {"default": DatasetDict(data) if kind in _SIMPLE else data}
    task.data_loaded = True
    return task


def _files(folder: Path) -> dict[str, Path]:
    """The files of JSON lines in a folder, by name without suffix."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and is_jsonl(path))
    return {path.name.partition(".jsonl")[0]: path for path in paths}


def _split(files: dict[str, Any]) -> str:
    preferred = [name for name in SPLIT_ORDER if name in files]
    others = sorted(set(files).difference(SPLIT_ORDER))
    return next(iter([*[n for n in preferred if n != "train"], *others, *preferred]))


def _dataset(rows: list[Row], fields: Iterable[str]) -> Dataset:
    return Dataset.from_dict({field: [row[field] for row in rows] for field in fields})


def _spread(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]
