"""What words alone find: mteb's BM25 on the retrieval and reranking tasks of a folder.

    python benchmarks/bm25.py --tasks DIR [--out benchmarks/results]

Writes ``bm25.json`` and ``bm25.md``. Tasks are read as ``gem-vllm evaluate --local`` reads them, so
the figures stand beside its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mteb
from benchmark_script import about, about_table, add_out, run_script
from mteb.abstasks.retrieval import AbsTaskRetrieval

from gem_vllm.evaluation.local_tasks import find_tasks, local_task
from gem_vllm.folders import write_json

MODEL = "mteb/baseline-bm25s"


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a folder a task")
    add_out(parser)
    args = parser.parse_args()
    of_run = about("mteb", "bm25s")
    result = {"scores": bm25_scores(args.tasks), "about": of_run}
    write_json(args.out / "bm25.json", result)
    (args.out / "bm25.md").write_text(markdown(result), encoding="utf-8")
    print(result["scores"])


def bm25_scores(tasks: Path) -> dict[str, dict[str, float]]:
    """Main score, by its name, of each task in ``tasks`` that retrieves or reranks."""
    model = mteb.get_model(MODEL)
    scores = {}
    for name, folder in find_tasks(tasks).items():
        task = local_task(folder)
        if isinstance(task, AbsTaskRetrieval):
            result = mteb.evaluate(model, task, cache=None, co2_tracker=False)
            score = float(result.task_results[0].main_score)
            scores[name] = {task.metadata.main_score: score}
    return scores


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        f"| {name} | {metric} | {score:.4f} |"
        for name, scores in result["scores"].items()
        for metric, score in scores.items()
    ]
    return "\n".join(
        [
            "# BM25",
            "",
            "English stemmer and stop words, as mteb's baseline has them; no model.",
            "",
            "| task | metric | BM25 |",
            "|---|---|---|",
            *rows,
            "",
            *about_table(result["about"]),
            "",
        ]
    )


if __name__ == "__main__":
    run_script(main)
