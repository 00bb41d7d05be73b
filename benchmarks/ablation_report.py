"""What `ablations.py` measured, as a page."""

from __future__ import annotations

from typing import Any

from ablation_rows import GROUPS
from benchmark_script import table
from development import TASKS


def markdown(results: dict[str, Any]) -> str:
    """The table of all rows that there are results of."""
    lines = [
        "# What each part of the recipe brings",
        "",
        "Short trainings of one recipe, changed in each as its title says; where, is said at the",
        "end.",
        "The seeds show how far two runs of the same may be apart. Development tasks, texts cut at",
        "256 tokens, the metrics of mteb; computed with transformers, not with the engine.",
        "",
    ]
    titles = ["", *(name.removesuffix("_Reranking") for name in TASKS), "mean"]
    for group, rows in GROUPS.items():
        done = [row for row in rows if row.name in results]
        if not done:
            continue
        shown = []
        for row in done:
            result = results[row.name]
            shown.append([row.title, *figures(result["scores"])])
            for size, scores in result["dimensions"].items():
                shown.append([f"the first {size} numbers of these", *figures(scores)])
        lines += [f"## {group}", "", table(titles, shown), ""]
    lines += ["## Commands", "", "Files by name; of the rows above, in order.", "", "```"]
    order = [row for rows in GROUPS.values() for row in rows if row.name in results]
    lines += [results[row.name]["command"] for row in order]
    about = sorted(
        {
            f"{entry['hardware']}, {entry['dtype']}, {entry['date']}, commit {entry['commit']}"
            for entry in results.values()
        }
    )
    return "\n".join([*lines, "```", "", *about]) + "\n"


def figures(scores: dict[str, float]) -> list[str]:
    """Of each task, and their mean."""
    values = [scores[name] for name in TASKS]
    return [f"{value:.4f}" for value in [*values, sum(values) / len(values)]]
