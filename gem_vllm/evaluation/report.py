"""The tables and the plot of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mteb.abstasks import AbsTask

from gem_vllm.compat import installed_vllm
from gem_vllm.evaluation.language_tasks import macro_accuracy, mmlu_shots
from gem_vllm.evaluation.options import EvaluateOptions
from gem_vllm.folders import write_json
from gem_vllm.machine import cpu_name, has_cuda
from gem_vllm.training.model_card import source_commit

PACKAGES = ("gem-vllm", "mteb", "lm-eval", "torch", "transformers")
PERPLEXITY = "word_perplexity,none"


@dataclass
class Column:
    """One model's results.

    Attributes:
        key: in ``results.json``, ``base`` or ``gem``.
        title: of the column.
        embedding: main scores by task.
        language: lm-eval's results by kind, ``mmlu`` and ``perplexity``.
    """

    key: str
    title: str
    embedding: dict[str, float]
    language: dict[str, dict[str, Any]]

    def language_scores(self) -> dict[str, tuple[float, float | None]]:
        """Figures and their standard errors, by name; a count is an int, and has none."""
        scores: dict[str, tuple[float, float | None]] = {}
        if mmlu := self.language.get("mmlu"):
            title = f"MMLU, {mmlu_shots(mmlu)}-shot"
            scores[f"{title}, accuracy"] = macro_accuracy(mmlu)
            # A folder's results may be from before it was counted.
            if "cut_contexts" in mmlu:
                scores[f"{title}, prompts cut at their start"] = (mmlu["cut_contexts"], None)
        if perplexity := self.language.get("perplexity"):
            scores["WikiText, word perplexity"] = (
                float(perplexity["results"]["wikitext"][PERPLEXITY]),
                None,
            )
        return scores


def write_report(options: EvaluateOptions, tasks: list[AbsTask], columns: list[Column]) -> None:
    """Write ``results.json``, ``results.md`` and ``results.png`` into the evaluation's folder."""
    about = _about(options)
    result = {
        "about": about,
        "embedding": {
            task.metadata.name: {
                "type": task.metadata.type,
                "metric": task.metadata.main_score,
                "split": task.eval_splits[0],
                **{column.key: column.embedding[task.metadata.name] for column in columns},
            }
            for task in tasks
        },
        "language": {column.key: column.language_scores() for column in columns},
    }
    write_json(options.out / "results.json", result)
    (options.out / "results.md").write_text(_markdown(result, columns), encoding="utf-8")
    if tasks:
        _plot(options.out / "results.png", result, columns)


def _about(options: EvaluateOptions) -> dict[str, str]:
    versions = {package: version(package) for package in PACKAGES}
    if vllm := installed_vllm():
        versions["vllm"] = vllm
    # A server's own are not known.
    whose = "client's " if options.url else ""
    about = {
        "model": Path(options.model).name + (" (served)" if options.url else ""),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        f"{whose}hardware": _hardware(),
        **({} if options.url else {"engine": str(options.engine_options())}),
        **({} if options.base is None else {"base": "embeds by mean pooling, in float32"}),
        "prompts": str(options.prompts or "none"),
        "commit": source_commit() or "none",
        f"{whose}versions": ", ".join(map(" ".join, versions.items())),
    }
    if options.limit is not None:
        about["limit"] = f"a quick look: {options.limit} rows or queries of each task"
    return about


def _hardware() -> str:
    import torch

    return torch.cuda.get_device_name() if has_cuda() else cpu_name()


def _markdown(result: dict[str, Any], columns: list[Column]) -> str:
    titles = [column.title for column in columns]
    lines = ["# Evaluation", ""]
    if limit := result["about"].get("limit"):
        lines += [f"**Not a result to quote: {limit}.**", ""]
    if result["embedding"]:
        lines += _row(["task", "metric", *titles, *(["gain"] if len(titles) > 1 else [])])
        lines += _row(["---"] * (2 + len(titles) + (len(titles) > 1)))
        for name, entry in result["embedding"].items():
            scores = [entry[column.key] for column in columns]
            gain = [f"{scores[-1] - scores[0]:+.4f}"] if len(titles) > 1 else []
            metric = f"{entry['metric']} ({entry['split']})"
            lines += _row([name, metric, *(f"{score:.4f}" for score in scores), *gain])
        lines.append("")
    names = next((list(scores) for scores in result["language"].values() if scores), [])
    if names:
        lines += _row(["as an LLM", *titles]) + _row(["---"] * (1 + len(titles)))
        for name in names:
            found = [result["language"][column.key].get(name) for column in columns]
            lines += _row([name, *("" if pair is None else _figure(*pair) for pair in found)])
        lines.append("")
    lines += _row(["", ""]) + _row(["---", "---"])
    for name, value in result["about"].items():
        lines += _row([name, value])
    return "\n".join(lines) + "\n"


def _figure(value: float, error: float | None) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _plot(file: Path, result: dict[str, Any], columns: list[Column]) -> None:
    """Bars by task, one for each column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["embedding"])
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.55 * len(names)))
    height = 0.8 / len(columns)
    for number, column in enumerate(columns):
        places = [place + (number + 0.5) * height - 0.4 for place in range(len(names))]
        bars = axes.barh(places, [column.embedding[n] for n in names], height, label=column.title)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
    labels = [f"{name}\n{result['embedding'][name]['metric']}" for name in names]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.invert_yaxis()
    lowest = min(score for column in columns for score in column.embedding.values())
    # Room for the figures; a score may be below 0.
    axes.set_xlim(lowest - 0.1 if lowest < 0 else 0, 1.1)
    if limit := result["about"].get("limit"):
        axes.set_title(limit, fontsize=9)
    figure.tight_layout()
    # Below the bars, where it hides none of them.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(columns))
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
