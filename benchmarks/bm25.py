"""What words alone tell: mteb's BM25, and the cosine of weighted words, on the tasks of a folder.

    python benchmarks/bm25.py --tasks DIR [--out runs/benchmarks]

BM25 retrieves and reranks; the cosine is of pairs of sentences. Writes ``bm25.json`` and
``bm25.md``. Tasks are read as ``gem-vllm evaluate --local`` reads them, so the figures stand beside
its own.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import Stemmer
from benchmark_script import about, about_table, add_out, run_script, write_result
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.pipeline import make_pipeline
from wikipedia_texts import TEXTS, read_paragraphs

from gem_vllm.evaluation.encoder import GemEncoder
from gem_vllm.evaluation.local_tasks import find_tasks, local_task

MODEL = "mteb/baseline-bm25s"
# Several times the stems of a task and of the texts that they are counted in.
HASHES = 1 << 16


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a folder a task")
    add_out(parser)
    args = parser.parse_args()
    of_run = about("mteb", "bm25s", "scikit-learn")
    result = {"scores": scores_of(args.tasks), "about": of_run}
    write_result(args.out, "bm25", result, markdown)
    print(result["scores"])


def scores_of(tasks: Path) -> dict[str, dict[str, Any]]:
    """Main score and its name, and of what it is, of each task in ``tasks`` that words can do."""
    bm25 = mteb.get_model(MODEL)
    cosine = GemEncoder(WordVectors(read_paragraphs(TEXTS)), "words", "0")
    scores: dict[str, dict[str, Any]] = {}
    for name, folder in find_tasks(tasks).items():
        task = local_task(folder)
        if isinstance(task, AbsTaskRetrieval):
            by, model = "BM25", bm25
        elif isinstance(task, AbsTaskSTS | AbsTaskPairClassification):
            by, model = "cosine", cosine
        else:
            continue
        result = mteb.evaluate(model, task, cache=None, co2_tracker=False).task_results[0]
        scores[name] = {
            "by": by,
            "metric": task.metadata.main_score,
            "score": float(result.main_score),
        }
    return scores


class WordVectors:
    """A text as its stemmed words, each weighted by how rare it is (tf-idf); an `Embedder`.

    Args:
        texts: in which to count how many have a word.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        stemmer = Stemmer.Stemmer("english")

        def words(text: str) -> list[str]:
            return stemmer.stemWords(re.findall(r"\w+", text.lower()))

        self._vectors = make_pipeline(
            HashingVectorizer(
                analyzer=words, n_features=HASHES, alternate_sign=False, norm=None, dtype=np.float32
            ),
            TfidfTransformer(sublinear_tf=True),
        ).fit(texts)

    def embed(self, texts: list[str]) -> np.ndarray:
        return self._vectors.transform(texts).toarray()


def markdown(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        f"| {name} | {score['metric']} | {score['by']} | {score['score']:.4f} |"
        for name, score in result["scores"].items()
    ]
    return "\n".join(
        [
            "# Words alone",
            "",
            "BM25: English stemmer and stop words, as mteb's baseline has them. Cosine: of stemmed "
            "words, weighted by tf-idf, counted in the examples' texts. No model.",
            "",
            "| task | metric | by | score |",
            "|---|---|---|---|",
            *rows,
            "",
            *about_table(result["about"]),
            "",
        ]
    )


if __name__ == "__main__":
    run_script(main)
