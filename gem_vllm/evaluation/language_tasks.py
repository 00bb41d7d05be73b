"""What lm-eval is given: MMLU and perplexity, from local files or by name; and MMLU's results."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

from gem_vllm.errors import GemError
from gem_vllm.evaluation.options import HUB, MMLU_SHOTS
from gem_vllm.training.data import open_text, read_jsonl

MMLU_FIELDS = ("subject", "question", "choices", "answer")
MMLU_SPLITS = ("dev", "test")
_CHOICES = ["A", "B", "C", "D"]
# As lm-eval's own tasks of that name have them.
_MMLU_TASK: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
    "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": _CHOICES,
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def mmlu_tasks(source: str) -> list[str | dict[str, Any]]:
    """lm-eval's tasks of MMLU: its own (source ``hub``), or from a folder of dev and test files.

    None of them says how many questions are shown before each: `run_language_tasks` is told.
    Raises GemError for a folder that does not hold them.
    """
    if source == HUB:
        return ["mmlu"]
    folder = Path(source)
    found = {split: _mmlu_rows(folder, split) for split in MMLU_SPLITS}
    subjects = sorted({row["subject"] for row in found["test"]})
    shown = Counter(row["subject"] for row in found["dev"])
    if few := [subject for subject in subjects if shown[subject] < MMLU_SHOTS]:
        raise GemError(
            f"--mmlu {folder}: dev has {shown[few[0]]} rows of {few[0]}; {MMLU_SHOTS} are shown "
            "before each question"
        )
    return [
        {
            **_MMLU_TASK,
            "task": f"mmlu_{subject}",
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "custom_dataset": _dataset_of(
                {
                    split: [row for row in rows if row["subject"] == subject]
                    for split, rows in found.items()
                }
            ),
        }
        for subject in subjects
    ]


def perplexity_tasks(source: str) -> list[str | dict[str, Any]]:
    """lm-eval's task ``wikitext``: its own (source ``hub``), or the same over a file of articles.

    A file is text of WikiText's form, also .gz: an article begins with a line `` = Title = ``.
    """
    if source == HUB:
        return ["wikitext"]
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    return [
        {
            "task": "wikitext",
            "custom_dataset": _dataset_of({"test": _articles(Path(source))}),
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": wikitext_detokenizer,
            "process_results": process_results,
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        }
    ]


def mmlu_shots(results: dict[str, Any]) -> int:
    """How many questions were shown before each of MMLU's."""
    (shots,) = {results["n-shot"][subject] for subject in _subjects(results)}
    return int(shots)


def macro_accuracy(results: dict[str, Any]) -> tuple[float, float]:
    """MMLU as the paper has it: the mean over subjects, and its standard error."""
    subjects = [results["results"][subject] for subject in _subjects(results)]
    mean = math.fsum(value["acc,none"] for value in subjects) / len(subjects)
    errors = [value["acc_stderr,none"] for value in subjects]
    # Of a subject of one question there is none.
    known = [error for error in errors if error != "N/A"]
    return mean, math.sqrt(math.fsum(error**2 for error in known)) / len(subjects)


def _subjects(results: dict[str, Any]) -> list[str]:
    """MMLU's tasks, without their groups."""
    groups = results.get("groups", {})
    return [name for name in results["results"] if name.startswith("mmlu_") and name not in groups]


def _mmlu_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}*.jsonl*")) if folder.is_dir() else []
    if len(files) != 1:
        raise GemError(
            f"--mmlu {folder}: needs one file {split}*.jsonl(.gz), and holds {len(files)}; or "
            "name hub, for lm-eval's own"
        )
    rows = []
    for where, row in read_jsonl(files[0]):
        if not isinstance(row, dict) or not set(MMLU_FIELDS) <= row.keys():
            raise GemError(f"{where}: expected an object with {', '.join(MMLU_FIELDS)}")
        if not isinstance(row["choices"], list) or len(row["choices"]) != len(_CHOICES):
            raise GemError(f"{where}: choices must be a list of {len(_CHOICES)} texts")
        if not all(isinstance(text, str) for text in [row["question"], *row["choices"]]):
            raise GemError(f"{where}: question and choices must be texts")
        if row["answer"] not in range(len(_CHOICES)):
            raise GemError(f"{where}: answer must be a choice's number, from 0 to 3")
        rows.append({field: row[field] for field in MMLU_FIELDS})
    return rows


def _articles(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise GemError(f"--perplexity {file} is not a file; or name hub, for lm-eval's own")
    try:
        with open_text(file) as lines:
            pages: list[list[str]] = []
            for line in lines:
                words = line.split()
                if len(words) > 2 and words[0] == words[-1] == "=" != words[1]:
                    pages.append([])
                if pages:
                    pages[-1].append(line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise GemError(f"--perplexity {file} cannot be read: {error}") from error
    if not pages:
        raise GemError(
            f"--perplexity {file} holds no article; one begins with a line ' = Title = '"
        )
    return [{"page": "".join(page)} for page in pages]


def _dataset_of(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    """What lm-eval calls for a task's data."""
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(r) for name, r in rows.items()})
    return lambda **kwargs: splits
