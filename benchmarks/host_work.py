"""What an engine does on the host for a request: a GEM engine beside plain vLLM.

    python benchmarks/host_work.py --tokenizer DIR [--rounds 10] [--out runs/benchmarks]

A fast GPU waits for the host where requests are short: for the Python that takes a request in,
schedules it and gives its result out. A model of next to nothing leaves that alone, on any machine;
front end and engine are one process here, so that all of it counts. ``--tokenizer`` is a folder
with a tokenizer. Writes ``host_work.json`` and ``host_work.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark_script import (
    about,
    about_table,
    add_out,
    in_turn,
    quartiles,
    run_script,
    write_result,
)
from engine_loads import CPU, solo_load, tasks_of
from engine_peer import Peer
from engine_report import PEER_OF
from random_checkpoint import make_base, make_checkpoint
from wikipedia_texts import read_texts

from gem_vllm.errors import GemError
from gem_vllm.processes import terminated_like_interrupted

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
OPTIONS = {
    **CPU.options,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 512,
    "enforce_eager": True,
}
# Requests of a turn; a completion is of MAX_TOKENS tokens.
AMOUNTS = {"embed 30": 4096, "generate": 256}
MAX_TOKENS = 16
IN_FLIGHT = 32
UNITS = {"embed 30": "text of about 30 tokens", "generate": f"completion of {MAX_TOKENS} tokens"}


def main() -> None:
    """Measure, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer")
    parser.add_argument("--rounds", type=int, default=10, help="the peers take turns this often")
    add_out(parser)
    args = parser.parse_args()
    if args.rounds < 1:
        raise GemError(f"--rounds is {args.rounds}; take 10 or more for figures to quote")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    of_run = about("vllm", "torch", "transformers")
    with terminated_like_interrupted(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_base(folder / "base", args.tokenizer, SHAPE)
        make_checkpoint(folder / "base", folder / "gem", 1)
        microseconds = measure(folder, args.rounds, stack)
    result = {
        "microseconds": microseconds,
        "about": {
            **of_run,
            "model": f"random weights, k = 1; {SHAPE}",
            "engines": str(OPTIONS),
            "in flight": f"{IN_FLIGHT} completions; texts all at once",
            "rounds": str(args.rounds),
        },
    }
    write_result(args.out, "host_work", result, markdown)
    print(markdown(result))


def measure(folder: Path, rounds: int, stack: ExitStack) -> dict[str, dict[str, list[float]]]:
    """Microseconds a request, by task and peer; every round gives each task to its peers in turn.

    Args:
        folder: with ``base`` and ``gem``.
        rounds: counted; one before them is not.
        stack: closes the peers.
    """
    setup = {
        "dtype": "float32",
        "options": OPTIONS,
        "max_tokens": MAX_TOKENS,
        "cores": sorted(os.sched_getaffinity(0)),
        **read_texts(folder / "base"),
    }
    peers: dict[str, Peer] = {}
    for kind in ("gem", "pooling", "generating"):
        model = str(folder / ("gem" if kind == "gem" else "base"))
        started = Peer.started(kind, {"kind": kind, "model": model, **setup}, folder)
        peers[kind] = stack.enter_context(started)
        peers[kind].receive()
    found: dict[str, dict[str, list[float]]] = {task: {} for task in AMOUNTS}
    for turn in range(rounds + 1):
        for task, amount in AMOUNTS.items():
            kinds = [kind for kind in peers if task in tasks_of(kind)]
            for kind in in_turn(kinds, turn + 1):
                peers[kind].send(solo_load(task, amount, IN_FLIGHT))
                seconds = peers[kind].receive()["seconds"]
                time.sleep(CPU.settle_seconds)
                if turn:
                    found[task].setdefault(kind, []).append(round(seconds / amount * 1e6, 1))
        print(f"round {turn} of {rounds}", flush=True)
    return found


def markdown(result: dict[str, Any]) -> str:
    """A row for each task: both times, and their ratio round by round."""
    lines = [
        "# What an engine does on the host",
        "",
        "| microseconds a | GEM engine | plain vLLM | plain vLLM / GEM engine | quartiles |",
        "|---|---|---|---|---|",
    ]
    for task, times in result["microseconds"].items():
        gem, plain = times["gem"], times[PEER_OF[task]]
        ratios = [b / a for a, b in zip(gem, plain, strict=True)]
        low, high = quartiles(ratios)
        lines.append(
            f"| {UNITS[task]} | {statistics.median(gem):.0f} | {statistics.median(plain):.0f} "
            f"| {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |"
        )
    lines += [
        "",
        "Medians over rounds in which the peers took turns. Front end, scheduler and model runner",
        "in one process, around a model of next to nothing.",
        "",
    ]
    return "\n".join([*lines, *about_table(result["about"])]) + "\n"


if __name__ == "__main__":
    run_script(main)
