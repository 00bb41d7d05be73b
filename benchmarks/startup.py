"""What gem-vllm and a GEM checkpoint add to the start of `vllm serve`, beside its base.

    python benchmarks/startup.py --model CHECKPOINT --base BASE [--rounds 5] [--out DIR]

Each round starts and ends both, from the command to the first answer, in an order that turns
round; what is added is the median of the rounds' differences. A round before those fills vLLM's
caches (compiled graphs, what it knows of an architecture), as every start but a machine's first
finds them. Writes ``startup.json`` and ``startup.md``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmark_script import (
    PLAIN_VLLM,
    add_out,
    commit,
    hardware,
    in_turn,
    run_script,
    shown_command,
    write_result,
)
from endpoint_servers import vllm_serve

from gem_vllm.processes import terminated_like_interrupted

BASE = "base"
OPTIONS = {"max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30}


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="GEM checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="the model that it was made from")
    parser.add_argument("--rounds", type=int, default=5)
    add_out(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; take 5 or more for figures to quote")
    for folder in (args.base, args.model):
        if not (folder / "config.json").is_file():
            parser.error(f"{folder} is no model folder: it holds no config.json")
    of_run = {
        "hardware": hardware(),
        "vllm": version("vllm"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": shown_command(sys.argv),
    }
    with terminated_like_interrupted():
        seconds = measure({BASE: args.base, "GEM checkpoint": args.model}, args.rounds)
    result = {"seconds": seconds, **of_run}
    write_result(args.out, "startup", result, markdown)


def measure(folders: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of each start, by round; a round before those is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in folders}
    for turn in range(rounds + 1):
        for name in in_turn(folders, turn):
            taken = start_seconds(folders[name], PLAIN_VLLM if name == BASE else {})
            print(f"{name}: {taken:.1f} s{'' if turn else ' (not counted)'}", flush=True)
            if turn:
                seconds[name].append(taken)
    return seconds


def start_seconds(folder: Path, environment: Mapping[str, str]) -> float:
    """From the command to the first answer of `vllm serve`."""
    with tempfile.TemporaryDirectory() as logs:
        begin = time.monotonic()
        with vllm_serve(folder, OPTIONS, Path(logs) / "server.log", environment):
            return time.monotonic() - begin


def markdown(result: Mapping[str, Any]) -> str:
    """The table, and what a GEM checkpoint adds within a round."""
    seconds: Mapping[str, Sequence[float]] = result["seconds"]
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        f"| {name} | {median[name]:.1f} | {min(taken):.1f} to {max(taken):.1f} |"
        for name, taken in seconds.items()
    ]
    added = [b - a for a, b in zip(seconds[BASE], seconds["GEM checkpoint"], strict=True)]
    return "\n".join(
        [
            "# The start of `vllm serve`",
            "",
            "From the command to the first answer, with vLLM's caches filled; the base as where "
            "gem-vllm is not installed.",
            "",
            "| | median, s | from, to |",
            "|---|---|---|",
            *rows,
            "",
            f"Added, the median of the rounds' differences: {statistics.median(added):+.1f} s "
            f"({min(added):+.1f} to {max(added):+.1f}) of {median[BASE]:.1f} s.",
            "",
            f"```\n{result['command']}\n```",
            "",
            f"{result['hardware']}, {result['date']}; vllm {result['vllm']}; commit "
            f"{result['commit'][:12]}{result['commit'][40:]}.",
            "",
        ]
    )


if __name__ == "__main__":
    run_script(main)
