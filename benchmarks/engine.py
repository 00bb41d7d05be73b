"""One GEM engine against plain vLLM and transformers, in one run on one machine.

    python benchmarks/engine.py --checkpoint DIR --base DIR            # about 20 minutes, 2 cores
    python benchmarks/engine.py --checkpoint DIR --base DIR --quick    # a few minutes, to try it

``--checkpoint`` is a GEM checkpoint, ``--base`` the model that it was made from. Writes
``engine.json`` and ``engine.md`` to ``--out`` (``engine-cuda.*`` on a GPU, ``-quick.*`` of quick
runs). What is measured, and how, is in README.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark_script import about, add_out, check_models, in_turn, run_script, write_result
from engine_facts import weight_bytes
from engine_loads import (
    CPU,
    CUDA,
    FULL,
    MIXED_TEXTS,
    QUICK,
    mixed_amounts,
    mixed_loads,
    solo_amount,
    solo_load,
    tasks_of,
)
from engine_peer import TRANSFORMERS_BATCH, Peer
from engine_report import MIXED_TARGETS, PEER_OF, UNITS, markdown, mixed_name, ratios
from wikipedia_texts import read_texts

from gem_vllm.adapter import ADAPTER_FOLDER
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.machine import has_cuda, serve_dtype
from gem_vllm.processes import terminated_like_interrupted


def main() -> None:
    """Measure, print the ratios, write both files."""
    args = parse_arguments()
    cores = sorted(os.sched_getaffinity(0))
    check(args, cores)
    with terminated_like_interrupted(), ExitStack() as stack:
        result = Run(args, cores, stack).measure()
    name = "engine" + "-cuda" * has_cuda() + "-quick" * args.quick
    write_result(args.out, name, result, markdown)
    for key, value in ratios(result).items():
        print(f"{key:>15}: {value:.3f}")
    print(f"written: {args.out / name}.json and .md")


def parse_arguments() -> argparse.Namespace:
    """The command line; exits with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a GEM checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="the base it was made from")
    add_out(parser)
    parser.add_argument("--rounds", type=int, default=10, help="the peers take turns this often")
    parser.add_argument(
        "--longer",
        type=int,
        default=1,
        metavar="N",
        help="turns of N times the length: for a model so large that few completions fit in one",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to try it out")
    return parser.parse_args()


def check(args: argparse.Namespace, cores: list[int]) -> None:
    """Raise GemError for what cannot be measured, before anything is started."""
    check_models(args.checkpoint, args.base)
    if args.rounds < 1:
        raise GemError(f"--rounds is {args.rounds}; take 10 or more for figures to quote")
    if args.longer < 1:
        raise GemError(f"--longer is {args.longer}; it takes 1 or more")
    if len(cores) < 2:
        raise GemError("two engines side by side need two cores; this process may use one")


class Run:
    """One run: peers that take turns, and what they measured.

    Args:
        args: the checked command line.
        cores: ids of the cores to use; two engines get half of them each.
        stack: closes what is still running at the end.
    """

    def __init__(self, args: argparse.Namespace, cores: list[int], stack: ExitStack) -> None:
        self.args, self.cores = args, cores
        self.k = GemConfig.from_pretrained(args.checkpoint).k
        self.size = (QUICK if args.quick else FULL).longer(args.longer)
        self.device = CUDA if has_cuda() else CPU
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.stack = stack
        self.started = time.monotonic()
        self.of_run = about("vllm", "torch", "transformers")
        self.setup = {
            "dtype": serve_dtype(),
            "options": self.device.options,
            "max_tokens": self.size.max_tokens,
            **read_texts(args.base),
        }

    def measure(self) -> dict[str, Any]:
        """All measurements, as `engine_report` describes them."""
        self.say("starting the GEM engine, plain vLLM (pooling, generating) and transformers")
        with ExitStack() as plain:
            kinds = ("pooling", "generating", "transformers")
            peers = {"gem": self.start(self.stack, "gem", self.cores)}
            peers |= {kind: self.start(plain, kind, self.cores) for kind in kinds}
            self.warm_up(peers)
            per_second = {
                task: self.rate(peers[plain_kind], task) for task, plain_kind in PEER_OF.items()
            }
            solo = self.measure_solo(peers, per_second)
        gem, half = peers["gem"], len(self.cores) // 2
        self.say("starting two engines of plain vLLM, which share the machine")
        two = {
            "pooling": self.start(self.stack, "pooling", self.cores[:half], "-half"),
            "generating": self.start(self.stack, "generating", self.cores[half:], "-half"),
        }
        self.warm_up(two)
        mixed = self.measure_mixed(gem, two, per_second)
        weights = self.weights()
        resident = {"one": gem.resident(), "two": sum(peer.resident() for peer in two.values())}
        return {
            "about": self.about(),
            "k": self.k,
            "solo": solo,
            "mixed": mixed,
            "memory": {
                key: {"weights": weights[key], "resident": resident[key]} for key in resident
            },
        }

    def start(self, stack: ExitStack, kind: str, cores: list[int], suffix: str = "") -> Peer:
        """Start a peer that runs until ``stack`` closes; it loads while others start."""
        model = self.args.checkpoint if kind == "gem" else self.args.base
        setup = {"kind": kind, "model": str(model.resolve()), "cores": cores, **self.setup}
        return stack.enter_context(Peer.started(kind + suffix, setup, self.folder))

    def warm_up(self, peers: dict[str, Peer]) -> None:
        """Wait until all have loaded, then let each do a little of everything it will be asked."""
        for peer in peers.values():
            peer.receive()
            self.say(f"{peer.name} has loaded")
        for kind, peer in peers.items():
            for task in tasks_of(kind):
                self.run_load({peer: self.solo_load(task, self.device.first_amounts[task])})

    def rate(self, peer: Peer, task: str) -> float:
        """Texts or completions per second of a task alone, to choose the size of a turn by."""
        amount = self.device.first_amounts[task]
        return amount / self.run_load({peer: self.solo_load(task, amount)})

    def solo_load(self, task: str, amount: int) -> dict[str, Any]:
        """A task alone, with as many requests in flight as this device takes."""
        return solo_load(task, amount, self.device.generations)

    def run_load(self, loads: dict[Peer, dict[str, Any]]) -> float:
        """Run one load on each peer, at the same time; seconds until the last has ended."""
        for peer, load in loads.items():
            peer.send(load)
        seconds = max(peer.receive()["seconds"] for peer in loads)
        time.sleep(self.device.settle_seconds)
        return float(seconds)

    def measure_solo(
        self, peers: dict[str, Peer], per_second: dict[str, float]
    ) -> dict[str, dict[str, list[float]]]:
        """Rates by task and peer; every round gives each task to all its peers in turn."""
        rates: dict[str, dict[str, list[float]]] = {task: {} for task in PEER_OF}
        for round_ in range(self.args.rounds):
            for task, of_task in rates.items():
                turn = [kind for kind in peers if task in tasks_of(kind)]
                amount = solo_amount(
                    task, per_second[task], self.size.solo_seconds, self.device.generations
                )
                unit = self.size.max_tokens if task == "generate" else 1
                for kind in in_turn(turn, round_):
                    seconds = self.run_load({peers[kind]: self.solo_load(task, amount)})
                    of_task.setdefault(kind, []).append(round(amount * unit / seconds, 3))
                shown = ", ".join(f"{kind} {of_task[kind][-1]:.1f}" for kind in turn)
                self.say(f"round {round_ + 1}: {task}, {UNITS[task]}: {shown}")
        return rates

    def measure_mixed(
        self, gem: Peer, two: dict[str, Peer], per_second: dict[str, float]
    ) -> dict[str, dict[str, Any]]:
        """Seconds by share of embedding work, for one engine and for two, in turn."""
        mixed: dict[str, dict[str, Any]] = {}
        for share in MIXED_TARGETS:
            amounts = mixed_amounts(int(share) / 100, per_second, self.size.mixed_seconds)
            mixed[share] = {"texts": amounts[0], "completions": amounts[1], "one": [], "two": []}
        for round_ in range(self.args.rounds):
            for share, work in mixed.items():
                load = mixed_loads(work["texts"], work["completions"], self.device)
                setups = {
                    "one": {gem: load["one"]},
                    "two": {two["pooling"]: load["embed"], two["generating"]: load["generate"]},
                }
                for setup in in_turn(setups, round_):
                    work[setup].append(round(self.run_load(setups[setup]), 3))
                shown = ", ".join(f"{setup} {work[setup][-1]:.1f} s" for setup in setups)
                self.say(f"round {round_ + 1}: {mixed_name(share)}: {shown}")
        return mixed

    def weights(self) -> dict[str, int]:
        """Bytes of the weights, in the engines' dtype: of one GEM engine, of two plain ones."""
        dtype = self.setup["dtype"]
        base = weight_bytes(self.args.base, dtype)
        adapter = self.args.checkpoint / ADAPTER_FOLDER
        return {
            "one": weight_bytes(self.args.checkpoint, dtype) + weight_bytes(adapter, dtype),
            # A pooling engine has no output head.
            "two": 2 * base - weight_bytes(self.args.base, dtype, only="lm_head."),
        }

    def about(self) -> dict[str, str]:
        """Where, when and with what this was measured."""
        size = self.size
        return {
            **self.of_run,
            "checkpoint": f"{self.args.checkpoint.name}, k = {self.k}; base: {self.args.base.name}",
            "dtype": self.setup["dtype"],
            "engines": ", ".join(f"{key}={value}" for key, value in self.device.options.items()),
            "turns": f"work that takes plain vLLM about {size.solo_seconds:.0f} s",
            "embedding alone": "all texts given at once; "
            f"transformers in batches of {TRANSFORMERS_BATCH}, sorted by length",
            "generation": f"{self.device.generations} at once, prompts of about 30 tokens, "
            f"{size.max_tokens} tokens each, greedy",
            "mixed load": f"work that takes plain vLLM about {size.mixed_seconds:.0f} s, each "
            f"task alone on all cores, divided as the share says; the texts of {MIXED_TEXTS!r}; "
            f"{self.device.embeddings} texts and {self.device.generations} completions in flight; "
            "time until both kinds are done",
            "rounds": str(self.args.rounds),
            "minutes": f"{(time.monotonic() - self.started) / 60:.1f}",
        }

    def say(self, what: str) -> None:
        """Progress, with the seconds so far."""
        print(f"[{time.monotonic() - self.started:4.0f} s] {what}", flush=True)


if __name__ == "__main__":
    run_script(main)
