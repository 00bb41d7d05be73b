"""What `latency.py` measured, as a page and as a plot; no measuring here.

A result is one JSON object:

- ``ask``: "one engine" and "two engines", each a list of seconds to the first token, one for each
  round.
- ``beside``: "alone", or a value of ``gem_tokens_beside_chat``, to a list of rounds, as
  `latency_peer.beside_texts` gives them.
- ``about``: name to value: hardware, command, commit, versions, date, settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from benchmark_script import about_table, table_row
from latency_peer import CHATS

DOCUMENT = 2000
NAMES = {"alone": "no texts", "None": "not set"}
KINDS = ("per_token", "gaps")
Rounds = Sequence[Mapping[str, Any]]


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables."""
    one, two = result["ask"]["one engine"], result["ask"]["two engines"]
    ratio = median(a / b for a, b in zip(one, two, strict=True))
    lines = [
        "# How long chat waits",
        "",
        f"## Embed {DOCUMENT:,} tokens, then ask about them: seconds to the first token",
        "",
        "| one engine, one prefix cache | a chat engine of its own | ratio | aim |",
        "|---|---|---|---|",
        f"| {median(one):.3f} | {median(two):.3f} | {ratio:.2f} | 0.2 |",
        "",
        f"## {CHATS} chats at a time, while texts of 200 to 260 tokens wait to be embedded",
        "",
        "Per token is a chat's mean time from one token to the next (vLLM's TPOT), its 99th",
        "percentile over the chats of a round; a gap is a single one of these times (vLLM's ITL).",
        "Ratios are to chat alone, within a round; all figures are medians over rounds. Texts are",
        "counted while all eight are being answered. A chat's first token waits for the texts that",
        "were there before it, unless requests have priorities.",
        "",
        "| `gem_tokens_beside_chat` | per token, p99, ms | ratio | gap, p99, ms | ratio "
        "| texts embedded, tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    alone = result["beside"]["alone"]
    for name, rounds in result["beside"].items():
        cells = [NAMES.get(name, name)]
        for kind in KINDS:
            seconds = median(p99(round_[kind]) for round_ in rounds)
            cells += [f"{1000 * seconds:.1f}", f"{ratio_to(alone, rounds, kind):.2f}"]
        cells.append(f"{embedded(rounds):.0f}")
        lines.append(table_row(cells))
    return (
        "\n".join([*lines, "", "![the trade](latency.png)", "", *about_table(result["about"])])
        + "\n"
    )


def p99(gaps: Sequence[float]) -> float:
    """The 99th percentile."""
    return float(np.percentile(gaps, 99))


def ratio_to(alone: Rounds, rounds: Rounds, kind: str) -> float:
    """`p99` of a kind of times against that of chat alone in a round; the median over rounds.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    pairs = zip(rounds, alone, strict=True)
    return float(median(p99(mine[kind]) / p99(base[kind]) for mine, base in pairs))


def embedded(rounds: Rounds) -> float:
    """Tokens of texts per second, the median over rounds."""
    return median(round_["embedded"] for round_ in rounds)


def plot(beside: Mapping[str, Rounds], file: Path) -> None:
    """Chat's wait against what is embedded."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    settings = {name: rounds for name, rounds in beside.items() if name != "alone"}
    across = [embedded(rounds) for rounds in settings.values()]
    up = [ratio_to(beside["alone"], rounds, "per_token") for rounds in settings.values()]
    axes.plot(across, up, marker="o")
    for name, x, y in zip(settings, across, up, strict=True):
        axes.annotate(NAMES.get(name, name), (x, y), textcoords="offset points", xytext=(5, 5))
    axes.set(
        xlabel="texts embedded, tokens/s",
        ylabel="time per token of chat, p99, against chat alone",
        title="gem_tokens_beside_chat",
        ylim=(0, None),
    )
    figure.savefig(file, dpi=120)
