"""What words alone find: mteb's BM25 on the retrieval and reranking tasks of a folder.

    python benchmarks/bm25.py --tasks DIR [--out benchmarks/results]

Writes ``bm25.json`` and ``bm25.md``. Tasks are read as ``gem-vllm evaluate --local`` reads them, so
the figures stand beside its own.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval

from gem_vllm.evaluation.local_tasks import find_tasks, local_task
from gem_vllm.folders import write_json
from gem_vllm.training.model_card import source_commit

MODEL = "mteb/baseline-bm25s"


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a folder a task")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    scores = bm25_scores(args.tasks)
    about = {
        "scores": scores,
        "mteb": version("mteb"),
        "bm25s": version("bm25s"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": source_commit(),
    }
    write_json(args.out / "bm25.json", about)
    (args.out / "bm25.md").write_text(markdown(about), encoding="utf-8")
    print(scores)


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


def markdown(about: dict) -> str:
    """The table."""
    rows = [
        f"| {name} | {metric} | {score:.4f} |"
        for name, scores in about["scores"].items()
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
            "```",
            "python benchmarks/bm25.py --tasks eval",
            "```",
            "",
            f"mteb {about['mteb']}, bm25s {about['bm25s']}, {about['date']}, "
            f"commit {about['commit']}",
            "",
        ]
    )


if __name__ == "__main__":
    main()
