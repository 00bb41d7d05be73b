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
from gem_vllm.folders import read_json, write_json
from gem_vllm.machine import cpu_name, has_cuda
from gem_vllm.training.model_card import source_commit

PACKAGES = ("gem-vllm", "mteb", "lm-eval", "torch", "transformers")
PERPLEXITY = "word_perplexity,none"
# Of "about": where and when a call measured.
ORIGIN = ("date", "hardware", "commit", "versions")


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
    """Write ``results.json``, ``results.md`` and ``results.png`` into the evaluation's folder.

    What an earlier call reported there stays in them, beside the tasks and columns of this one.
    """
    file = options.out / "results.json"
    before = read_json(file) if file.is_file() else {}
    titles = before.get("titles", {}) | {column.key: column.title for column in columns}
    language = before.get("language", {})
    about = before.get("about", {}) | _about(options)
    result = {
        "about": about,
        "earlier": _earlier(before, about),
        "titles": dict(sorted(titles.items())),  # the base's before its checkpoint's
        "embedding": before.get("embedding", {})
        | {task.metadata.name: _entry(task, columns, before) for task in tasks},
        "language": language
        | {
            column.key: language.get(column.key, {}) | column.language_scores()
            for column in columns
        },
    }
    write_json(file, result)
    (options.out / "results.md").write_text(_markdown(result), encoding="utf-8")
    if result["embedding"]:
        _plot(options.out / "results.png", result)


def _earlier(before: dict[str, Any], about: dict[str, str]) -> list[dict[str, str]]:
    """Where scores of earlier calls are from, as far as that is not where this call's are from."""
    calls = [*before.get("earlier", ()), _origin(before.get("about", {}))]
    differ = [call for call in calls if call and call != _origin(about)]
    return [call for number, call in enumerate(differ) if call not in differ[:number]]


def _origin(about: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in about.items() if name.endswith(ORIGIN)}


def _entry(task: AbsTask, columns: list[Column], before: dict[str, Any]) -> dict[str, Any]:
    """A task's scores, with those that are of the same data in an earlier report."""
    name, revision = task.metadata.name, task.metadata.revision
    known = before.get("embedding", {}).get(name, {})
    return {
        **(known if known.get("revision") == revision else {}),
        "type": task.metadata.type,
        "metric": task.metadata.main_score,
        "split": task.eval_splits[0],
        "revision": revision,
        **{column.key: column.embedding[name] for column in columns},
    }


def _about(options: EvaluateOptions) -> dict[str, str]:
    versions = {package: version(package) for package in PACKAGES}
    if vllm := installed_vllm():
        versions["vllm"] = vllm
    # A server's own are not known.
    whose = "client's " if options.url else ""
    about = {
        "model": options.model_name + (" (served)" if options.url else ""),
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


def _markdown(result: dict[str, Any]) -> str:
    keys, titles = list(result["titles"]), list(result["titles"].values())
    lines = ["# Evaluation", ""]
    if limit := result["about"].get("limit"):
        lines += [f"**Not a result to quote: {limit}.**", ""]
    if result["embedding"]:
        lines += _row(["task", "metric", *titles, *(["gain"] if len(titles) > 1 else [])])
        lines += _row(["---"] * (2 + len(titles) + (len(titles) > 1)))
        for name, entry in result["embedding"].items():
            cells = [f"{entry[key]:.4f}" if key in entry else "" for key in keys]
            if len(keys) > 1:
                both = set(keys) <= entry.keys()
                cells.append(f"{entry['gem'] - entry['base']:+.4f}" if both else "")
            lines += _row([name, f"{entry['metric']} ({entry['split']})", *cells])
        lines.append("")
    names = list(dict.fromkeys(name for of in result["language"].values() for name in of))
    if names:
        lines += _row(["as an LLM", *titles]) + _row(["---"] * (1 + len(titles)))
        for name in names:
            found = [result["language"].get(key, {}).get(name) for key in keys]
            lines += _row([name, *("" if pair is None else _figure(*pair) for pair in found)])
        lines.append("")
    lines += _row(["", ""]) + _row(["---", "---"])
    for name, value in result["about"].items():
        lines += _row([name, value])
    for call in result["earlier"]:
        lines += _row(["an earlier call", "; ".join(call.values())])
    return "\n".join(lines) + "\n"


def _figure(value: float, error: float | None) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _plot(file: Path, result: dict[str, Any]) -> None:
    """Bars by task, one for each column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, entries = list(result["embedding"]), list(result["embedding"].values())
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.55 * len(names)))
    height = 0.8 / len(result["titles"])
    lowest = 0.0
    for number, (key, title) in enumerate(result["titles"].items()):
        scores = {place: entry[key] for place, entry in enumerate(entries) if key in entry}
        places = [place + (number + 0.5) * height - 0.4 for place in scores]
        bars = axes.barh(places, list(scores.values()), height, label=title)
        axes.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        lowest = min([lowest, *scores.values()])
    labels = [f"{name}\n{entry['metric']}" for name, entry in zip(names, entries, strict=True)]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.invert_yaxis()
    # Room for the figures; a score may be below 0.
    axes.set_xlim(lowest - 0.1 if lowest < 0 else 0, 1.1)
    if limit := result["about"].get("limit"):
        axes.set_title(limit, fontsize=9)
    figure.tight_layout()
    # Below the bars, where it hides none of them.
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=len(result["titles"])
    )
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
