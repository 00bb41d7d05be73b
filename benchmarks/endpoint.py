"""`gem-vllm serve` against bare `vllm serve`, and under a load that swings between its two tasks.

    python benchmarks/endpoint.py --checkpoint DIR                  # about 30 minutes, 2 cores
    python benchmarks/endpoint.py --checkpoint DIR --only swing     # a part of it

The parts are `embed`, `chat`, `stream` and `swing`. A part that is run puts its figures in the
place of its last ones in ``endpoint.json`` and ``endpoint.md``, in ``--out``, and leaves the other
parts' there. What is measured, and how, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark_script import about, add_out, in_turn, run_script, write_result
from endpoint_client import Load, Outcome, bodies_of, run
from endpoint_report import SHARES, TASK_NAMES, markdown, ratios
from endpoint_servers import (
    MODEL,
    Server,
    awake,
    busy_seconds,
    gem_vllm_serve,
    idle_cores,
    vllm_serve,
)
from engine_loads import mixed_amounts
from wikipedia_texts import read_texts

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.machine import serve_dtype
from gem_vllm.processes import terminated_like_interrupted

PARTS = (*TASK_NAMES, "swing")
IN_FLIGHT = (32, 256)
MAX_TOKENS = 16
# A turn has as many requests as bare vLLM answers in so long, but all that are in flight at least.
TURN_SECONDS = 8.0
# Of a phase of the swing, on one core.
SWING_SECONDS = 16.0
SWING_IN_FLIGHT = 32
# As `vllm serve` does on a CPU, but without the prefix cache: every text is computed.
ENGINE_OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 128,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": False,
}
BOTH = ("--min-replicas", "2", "--cpus-per-replica", "1")
HALF = ("--cpus-per-replica", "1")


def main() -> None:
    """Measure the parts that are asked for, print the ratios, write both files."""
    args = parse_arguments()
    check(args)
    file = args.out / "endpoint.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"about": {}}
    for part in args.only:
        with terminated_like_interrupted(), ExitStack() as stack:
            Part(part, args, stack).measure(result)
        write_result(args.out, "endpoint", result, markdown)
    for name, value in ratios(result).items():
        print(f"{name:>42}: {value:.3f}")
    print(f"written: {file} and .md")


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a GEM checkpoint")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--rounds", type=int, default=3, help="the servers take turns this often")
    add_out(parser, goes_on=True)
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raise GemError for what cannot be measured, before anything is started."""
    import torch

    GemConfig.from_pretrained(args.checkpoint)
    if args.rounds < 1:
        raise GemError(f"--rounds is {args.rounds}; take 3 or more for figures to quote")
    if torch.cuda.is_available():
        raise GemError("this machine has a GPU; the benchmark divides the cores of a CPU")
    if len(os.sched_getaffinity(0)) < 2:
        raise GemError("two replicas side by side need two cores; this process may use one")


class Part:
    """One part of the benchmark: servers that take turns, and what they measured.

    Args:
        name: of `PARTS`.
        args: the checked command line.
        stack: ends the servers.
    """

    def __init__(self, name: str, args: argparse.Namespace, stack: ExitStack) -> None:
        self.name, self.args, self.stack = name, args, stack
        self.logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.started = time.monotonic()
        self.of_run = about("vllm", "torch", "ray")
        self.others: list[float] = []
        texts = read_bodies(args.checkpoint)
        self.bodies = {task: bodies_of(task, texts[task], MODEL, MAX_TOKENS) for task in TASK_NAMES}

    def measure(self, result: dict[str, Any]) -> None:
        """Put this part's figures into a result, as `endpoint_report` describes it."""
        if self.name == "swing":
            result["swing"], idle = self.swing()
        else:
            result.setdefault("overhead", {})[self.name], idle = self.overhead()
        result["about"][self.name] = self.about(idle)

    def overhead(self) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
        """Serve and bare vLLM in turn, with one task."""
        servers = {
            "vllm": self.start("vllm serve", vllm_serve),
            "serve": self.start("gem-vllm serve", gem_vllm_serve),
        }
        idle = {server.name: idle_cores([server]) for server in servers.values()}
        # The first turn of each is to warm up, the second of vLLM says how much a turn should be.
        few = min(IN_FLIGHT)
        for server in (*servers.values(), servers["vllm"]):
            seconds = self.turn([server], [self.load(server, self.name, few, few)]).seconds
        figures = {
            str(in_flight): {
                "amount": max(1, round(TURN_SECONDS / seconds * few / in_flight)) * in_flight,
                **{name: {"seconds": [], "first_token": []} for name in servers},
            }
            for in_flight in IN_FLIGHT
        }
        for round_ in range(self.args.rounds):
            for in_flight, figure in figures.items():
                for name in in_turn(servers, round_):
                    server = servers[name]
                    load = self.load(server, self.name, figure["amount"], int(in_flight))
                    outcome = self.turn([server], [load])
                    figure[name]["seconds"].append(round(outcome.seconds, 3))
                    if outcome.first_token:
                        median = statistics.median(outcome.first_token)
                        figure[name]["first_token"].append(round(median, 4))
                shown = ", ".join(f"{name} {figure[name]['seconds'][-1]:.1f} s" for name in servers)
                self.say(f"round {round_ + 1}: {in_flight} in flight: {shown}")
        return figures, idle

    def swing(self) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
        """Two replicas for both tasks, and one for each, in turn, through all phases."""
        both = self.start("both", gem_vllm_serve, BOTH)
        embed = self.start("embed", gem_vllm_serve, HALF)
        chat = self.start("chat", gem_vllm_serve, HALF)
        idle = {"both": idle_cores([both]), "halves": idle_cores([embed, chat])}
        # The first turn of each is to warm up, and the halves' say how much a phase should be.
        per_second = {}
        for task, half, name in (("embed", embed, "embed 30"), ("chat", chat, "generate")):
            amount = SWING_IN_FLIGHT
            for server in (both, half, half):
                seconds = self.turn([server], [self.load(server, task, amount)]).seconds
            per_second[name] = amount / seconds
        phases: dict[str, dict[str, Any]] = {}
        for share in SHARES:
            texts, chats = mixed_amounts(int(share) / 100, per_second, SWING_SECONDS)
            phases[share] = {"texts": texts, "completions": chats, "both": [], "halves": []}
        setups = {"both": (both, both), "halves": (embed, chat)}
        for round_ in range(self.args.rounds):
            for setup in in_turn(setups, round_):
                of_embed, of_chat = setups[setup]
                for phase in phases.values():
                    loads = [
                        self.load(of_embed, "embed", phase["texts"]),
                        self.load(of_chat, "chat", phase["completions"]),
                    ]
                    seconds = self.turn(list({of_embed, of_chat}), loads).seconds
                    phase[setup].append(round(seconds, 3))
            for share, phase in phases.items():
                shown = ", ".join(f"{setup} {phase[setup][-1]:.1f} s" for setup in setups)
                self.say(f"round {round_ + 1}: {share} % embedding: {shown}")
        return phases, idle

    def start(self, name: str, kind: Any, arguments: tuple[str, ...] = ()) -> Server:
        """Start a server that lives as long as this part."""
        self.say(f"starting {name}")
        log = self.logs / f"{name}.log"
        extra = (arguments,) if arguments else ()
        return self.stack.enter_context(kind(self.args.checkpoint, ENGINE_OPTIONS, log, *extra))

    def load(
        self, server: Server, task: str, amount: int, in_flight: int = SWING_IN_FLIGHT
    ) -> Load:
        """Requests of a task to a server."""
        return Load(server.url, task, self.bodies[task], amount, in_flight)

    def turn(self, servers: list[Server], loads: list[Load]) -> Outcome:
        """Run loads on servers while all others are stopped."""
        with awake(servers):
            before = _of_others(servers)
            outcome = run(loads)
            self.others.append((_of_others(servers) - before) / outcome.seconds)
            return outcome

    def about(self, idle: dict[str, float]) -> dict[str, str]:
        """Where, when and with what this part was measured."""
        return {
            **self.of_run,
            "checkpoint": self.args.checkpoint.name,
            "dtype": serve_dtype(),
            "engines": ", ".join(f"{name}={value}" for name, value in ENGINE_OPTIONS.items()),
            "rounds": str(self.args.rounds),
            "cores used while idle": ", ".join(f"{k}: {v:.2f}" for k, v in idle.items()),
            "cores used by others": f"{statistics.median(self.others):.2f}, "
            f"in one turn {max(self.others):.2f}",
            "minutes": f"{(time.monotonic() - self.started) / 60:.1f}",
        }

    def say(self, message: str) -> None:
        """A line of progress."""
        seconds = time.monotonic() - self.started
        print(f"[{seconds:5.0f} s] {self.name}: {message}", flush=True)


def _of_others(servers: list[Server]) -> float:
    """CPU seconds so far that neither these servers nor this process used."""
    used = sum(server.cpu_seconds() for server in servers) + time.process_time()
    return busy_seconds() - used


def read_bodies(checkpoint: Path) -> dict[str, list[str]]:
    """Texts of about 30 tokens by task."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = read_texts(checkpoint)
    texts = tokenizer.batch_decode(ids["texts"]["embed 30"])
    prompts = tokenizer.batch_decode(ids["prompts"])
    return {"embed": texts, "chat": prompts, "stream": prompts}


if __name__ == "__main__":
    run_script(main)
