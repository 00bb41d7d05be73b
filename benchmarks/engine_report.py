"""What `engine.py` measured, as ratios and as Markdown; no measuring here.

A result is one JSON object:

- ``solo``: task ("embed 30", "embed 230", "generate") to peer ("gem", "pooling", "generating",
  "transformers") to a list of rates, one for each round: texts/s, or generated tokens/s.
- ``mixed``: share of embedding work ("50", "90", "10", in percent) to ``texts``, ``completions``
  and, for "one" and "two" engines, a list of seconds, one for each round.
- ``memory``: ``one`` and ``two``, each with ``weights`` and ``resident``, in bytes.
- ``about``: name to value: hardware, command, commit, versions, date, settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark_script import quartiles, table

PEER_OF = {"embed 30": "pooling", "embed 230": "pooling", "generate": "generating"}
UNITS = {"embed 30": "texts/s", "embed 230": "texts/s", "generate": "tokens/s"}
TASK_NAMES = {
    "embed 30": "embed, texts of about 30 tokens",
    "embed 230": "embed, texts of about 230 tokens",
    "generate": "generate, many at once",
}
SOLO_TARGET = 0.97
SEVERAL_TOKENS_TARGET = 0.95  # of embeddings of more than one special token
MIXED_TARGETS = {"50": 1.0, "90": 1.4, "10": 1.4}


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The benchmark's outcome: GEM against plain vLLM, larger is better.

    Returns:
        "embed 30", "embed 230", "generate": rate of the GEM engine over that of plain vLLM;
        "mixed 50/50", "mixed 90/10", "mixed 10/90" (embedding/generating work): time of two
        engines over that of one; each the median over rounds. "weight memory": bytes of one
        engine over those of two.
    """
    found = {name: statistics.median(values) for name, values in ratios_by_round(result).items()}
    found["weight memory"] = result["memory"]["one"]["weights"] / result["memory"]["two"]["weights"]
    return {name: round(value, 3) for name, value in found.items()}


def ratios_by_round(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """What `ratios` takes medians of: what drifts between rounds cancels out within one.

    Raises:
        ValueError: two peers were not measured in the same rounds.
    """
    pairs = {
        task: (rates["gem"], rates[PEER_OF[task]]) for task, rates in result["solo"].items()
    } | {mixed_name(share): (load["two"], load["one"]) for share, load in result["mixed"].items()}
    return {
        name: [a / b for a, b in zip(first, second, strict=True)]
        for name, (first, second) in pairs.items()
    }


def mixed_name(share: str) -> str:
    """ "90" to "mixed 90/10"."""
    return f"mixed {share}/{100 - int(share)}"


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a Markdown page: ratios first, then what they are made of."""
    return (
        "\n\n".join(
            [
                "# One GEM engine against plain vLLM",
                _ratio_table(result),
                "Each ratio is the median over rounds in which the peers took turns, with the "
                "quartiles beside it; larger is better, except for the weight memory.",
                "## Each task alone",
                _solo_table(result["solo"]),
                "## Both tasks at once: one engine on the whole machine, or two that share it",
                _mixed_table(result["mixed"]),
                "## Memory",
                _memory_table(result["memory"]),
                "## How it was measured",
                table(["", ""], list(result["about"].items())),
            ]
        )
        + "\n"
    )


def _ratio_table(result: Mapping[str, Any]) -> str:
    targets = dict.fromkeys(PEER_OF, SOLO_TARGET)
    if result["k"] > 1:
        embedding = [task for task, peer in PEER_OF.items() if peer == "pooling"]
        targets |= dict.fromkeys(embedding, SEVERAL_TOKENS_TARGET)
    targets |= {mixed_name(share): target for share, target in MIXED_TARGETS.items()}
    spread = {
        name: "{:.2f} to {:.2f}".format(*quartiles(values))
        for name, values in ratios_by_round(result).items()
    }
    rows = [
        (
            name,
            f"{value:.2f}",
            spread.get(name, ""),
            f">= {targets[name]}" if name in targets else "",
        )
        for name, value in ratios(result).items()
    ]
    return table(["GEM engine / plain vLLM", "ratio", "quartiles", "target"], rows)


def _solo_table(solo: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    rows = []
    for task, rates in solo.items():
        cells = [
            f"{statistics.median(rates[peer]):.1f}" if peer in rates else ""
            for peer in ("gem", PEER_OF[task], "transformers")
        ]
        rows.append((TASK_NAMES[task], UNITS[task], *cells))
    return table(["task", "unit", "GEM engine", "plain vLLM", "transformers"], rows)


def _mixed_table(mixed: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            f"{share} / {100 - int(share)}",
            load["texts"],
            load["completions"],
            f"{statistics.median(load['one']):.1f}",
            f"{statistics.median(load['two']):.1f}",
        )
        for share, load in mixed.items()
    ]
    head = ["% embed / generate", "texts", "completions", "one GEM engine, s", "two engines, s"]
    return table(head, rows)


def _memory_table(memory: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        (name, *(f"{memory[setup][kind] / 1e6:.0f} MB" for setup in ("one", "two")))
        for kind, name in (("weights", "weights"), ("resident", "all processes, resident"))
    ]
    return table(["", "one GEM engine", "two engines"], rows)
