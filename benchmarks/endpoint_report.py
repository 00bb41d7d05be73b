"""What `endpoint.py` measured, as ratios and as Markdown; no measuring here.

A result is one JSON object, of which a run may have made only some parts:

- ``overhead``: task ("embed", "chat", "stream") to requests in flight ("32", "256") to ``amount``
  (requests of a turn) and, for "serve" and "vllm", to ``seconds`` and, for streams,
  ``first_token`` (median seconds to the first text), one for each round.
- ``swing``: share of embedding work ("10", "50", "90", in percent) to ``texts``, ``completions``
  and, for "both" and "halves", a list of seconds, one for each round.
- ``about``: part (a task, or "swing") to name to value: hardware, command, commit, settings.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmark_script import quartiles, table

TASK_NAMES = {"embed": "embeddings", "chat": "chat", "stream": "chat, streamed"}
SHARES = ("10", "50", "90")
TARGET = 0.9


def ratios_by_round(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Serve against bare vLLM, and replicas for both tasks against halves; larger is better.

    Returns:
        "embeddings, 32 in flight" and so on: requests per second of Serve over vLLM's;
        "..., first token": vLLM's median time to it over Serve's;
        "swing 10/90" and so on: seconds of the halves over those of replicas for both tasks;
        "swing, whole": the same for all phases together. Each by round.
    """
    found: dict[str, list[float]] = {}
    for task, by_in_flight in result.get("overhead", {}).items():
        for in_flight, load in by_in_flight.items():
            serve, vllm = load["serve"], load["vllm"]
            name = f"{TASK_NAMES[task]}, {in_flight} in flight"
            found[name] = _divided(vllm["seconds"], serve["seconds"])
            if task == "stream":
                found[f"{name}, first token"] = _divided(vllm["first_token"], serve["first_token"])
    if swing := result.get("swing"):
        for share, load in swing.items():
            found[f"swing {_shares(share)}"] = _divided(load["halves"], load["both"])
        halves, both = (
            [sum(phases) for phases in zip(*(load[setup] for load in swing.values()), strict=True)]
            for setup in ("halves", "both")
        )
        found["swing, whole"] = _divided(halves, both)
    return found


def ratios(result: Mapping[str, Any]) -> dict[str, float]:
    """The medians of `ratios_by_round`."""
    return {name: statistics.median(values) for name, values in ratios_by_round(result).items()}


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a Markdown page: ratios first, then what they are made of."""
    blocks = [
        "# The Ray Serve endpoint",
        _ratio_table(result),
        "Each ratio is the median over rounds in which the servers took turns, with the quartiles "
        "beside it; larger is better.",
    ]
    if "overhead" in result:
        blocks += [
            "## `gem-vllm serve` with one replica, and bare `vllm serve`",
            _overhead_table(result["overhead"]),
        ]
    if "swing" in result:
        blocks += [
            "## A load that swings: two replicas for both tasks, and one for each",
            _swing_table(result["swing"]),
        ]
    for part, about in result["about"].items():
        name = TASK_NAMES.get(part, part)
        blocks += [f"## How it was measured: {name}", table(["", ""], list(about.items()))]
    return "\n\n".join(blocks) + "\n"


def _ratio_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, values in ratios_by_round(result).items():
        overhead = name.endswith("in flight")
        spread = "{:.2f} to {:.2f}".format(*quartiles(values))
        target = f">= {TARGET}" if overhead else ""
        rows.append((name, f"{statistics.median(values):.2f}", spread, target))
    return table(["", "ratio", "quartiles", "target"], rows)


def _overhead_table(overhead: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for task, by_in_flight in overhead.items():
        for in_flight, load in by_in_flight.items():
            sides = (load["serve"], load["vllm"])
            rates = [load["amount"] / statistics.median(side["seconds"]) for side in sides]
            waits = [
                f"{statistics.median(side['first_token']):.2f}" if task == "stream" else ""
                for side in sides
            ]
            row = (f"{rate:.1f}" for rate in rates)
            rows.append((TASK_NAMES[task], in_flight, load["amount"], *row, *waits))
    head = ["task", "in flight", "requests", "Serve, requests/s", "vLLM, requests/s"]
    return table([*head, "Serve, first token, s", "vLLM, first token, s"], rows)


def _swing_table(swing: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            _shares(share),
            load["texts"],
            load["completions"],
            f"{statistics.median(load['both']):.1f}",
            f"{statistics.median(load['halves']):.1f}",
        )
        for share, load in swing.items()
    ]
    head = ["% embed/chat", "texts", "chats", "both tasks on both, s", "one task on each, s"]
    return table(head, rows)


def _shares(share: str) -> str:
    return f"{share}/{100 - int(share)}"


def _divided(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]
