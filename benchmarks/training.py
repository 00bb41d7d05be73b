"""Training, against a forward pass, an ordinary LoRA fine-tune, and sentence-transformers.

    python benchmarks/training.py --base DIR [--peers PEER ...] [--out benchmarks/results]

Pairs of Wikipedia texts of one length, the same for all; each peer in a process of its own, one
after the other, `--rounds` times, in an order that turns round. Writes ``training.json`` and
``training.md`` after every round, beside what is there of other bases and processors, and in the
place of an earlier run of the same settings and peers. About ten minutes on two cores that have
nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmark_script import (
    about,
    about_table,
    add_out,
    hardware,
    in_turn,
    run_script,
    write_result,
)
from training_peers import PEERS
from transformers import AutoTokenizer
from wikipedia_texts import TEXTS, read_paragraphs

from gem_vllm.errors import GemError
from gem_vllm.training.options import compute_dtype

WARM_UP = 2
SCRIPT = Path(__file__).with_name("training_peers.py")
FORWARD, ADAPTER, ORDINARY = "forward", "gem adapter", "Trainer, LoRA"


def main() -> None:
    """Run all peers and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    add_out(parser, goes_on=True)
    parser.add_argument("--special-tokens", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of every text")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    if args.rounds < 1:
        raise GemError(f"--rounds is {args.rounds}; take 2 or more for figures to quote")
    if args.steps < 1:
        raise GemError(f"--steps is {args.steps}; take 5 or more for figures to quote")
    settings = {
        "tokens": args.tokens,
        "pairs": args.batch,
        "special_tokens": args.special_tokens,
        "dtype": str(compute_dtype(args.dtype)).removeprefix("torch."),
    }
    file = args.out / "training.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    name = f"{args.base.resolve().name}, {hardware()}"
    if lost := what_would_be_lost(results.get(name), settings, args.peers):
        raise GemError(
            f"{file} has {', '.join(lost)} of {name}, in the place of which this run would come; "
            "choose another --out"
        )
    of_run = about("torch", "transformers", "peft", "sentence-transformers")
    rounds: dict[str, list[dict[str, Any]]] = {peer: [] for peer in args.peers}
    with tempfile.TemporaryDirectory() as work:
        pairs = write_pairs(args, Path(work) / "pairs.jsonl")
        for number in range(args.rounds):
            for peer, measured in measure_round(number, args, pairs, Path(work)).items():
                rounds[peer].append(measured)
            results[name] = {**settings, "about": of_run, "rounds": rounds}
            write_result(args.out, "training", results, markdown)
    print((args.out / "training.md").read_text())


def what_would_be_lost(
    earlier: Mapping[str, Any] | None, settings: Mapping[str, Any], peers: Sequence[str]
) -> list[str]:
    """What an earlier run has that this one, which takes its place, does not measure.

    Peers are compared within a round, so those of two runs do not go together.
    """
    if earlier is None:
        return []
    others = [f"{name} {earlier[name]}" for name in settings if earlier[name] != settings[name]]
    return [*others, *(f"rounds of {peer!r}" for peer in earlier["rounds"] if peer not in peers)]


def write_pairs(args: argparse.Namespace, file: Path) -> Path:
    """Pairs of texts that follow each other, each of ``--tokens`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    stream = [i for row in tokenizer(read_paragraphs(TEXTS))["input_ids"] for i in row]
    needed = 2 * args.batch * args.tokens
    if len(stream) < needed:
        raise GemError(f"{TEXTS.name} has {len(stream)} tokens; --batch and --tokens need {needed}")
    pieces = [
        tokenizer.decode(stream[start : start + args.tokens])
        for start in range(0, needed, args.tokens)
    ]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    lines = [json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def measure_round(
    number: int, args: argparse.Namespace, pairs: Path, work: Path
) -> dict[str, dict[str, Any]]:
    """Every peer once, in an order that turns round."""
    found = {}
    for peer in in_turn(args.peers, number):
        print(f"round {number + 1}: {peer}", file=sys.stderr, flush=True)
        found[peer] = run(peer, args, pairs, work)
    return found


def run(peer: str, args: argparse.Namespace, pairs: Path, work: Path) -> dict[str, Any]:
    """One peer, once."""
    setup = {
        "peer": peer,
        "base": str(args.base),
        "pairs": str(pairs),
        "batch": args.batch,
        "steps": args.steps + WARM_UP,
        "special_tokens": args.special_tokens,
        "dtype": args.dtype,
    }
    with tempfile.TemporaryDirectory(dir=work) as folder:
        file = Path(folder) / "setup.json"
        file.write_text(json.dumps({**setup, "work": folder}))
        done = subprocess.run(
            [sys.executable, SCRIPT, file], capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(
            f"{done.stderr[-3000:]}\nerror: {peer!r} failed, see above; all rounds before this one "
            "are written"
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["seconds"] = result["seconds"][WARM_UP:]
    return result


def markdown(results: dict[str, Any]) -> str:
    """All results, by base and processor."""
    lines = [
        "# Training",
        "",
        "Medians over steps and rounds; a ratio is taken within a round. Memory: the most that",
        "model and training took.",
        "",
    ]
    for name, result in results.items():
        lines += [f"## {name}", "", *section(result)]
    return "\n".join(lines)


def section(result: dict[str, Any]) -> list[str]:
    """The table, and those ratios that there are aims for."""
    seconds = {
        peer: [statistics.median(each["seconds"]) for each in rounds]
        for peer, rounds in result["rounds"].items()
    }
    rates = {
        peer: [each["tokens"] / step for each, step in zip(rounds, seconds[peer], strict=True)]
        for peer, rounds in result["rounds"].items()
    }
    memory = {
        peer: [each["peak_bytes"] for each in rounds] for peer, rounds in result["rounds"].items()
    }
    rounds = len(next(iter(result["rounds"].values())))
    lines = [
        f"{result['pairs']} pairs of texts of {result['tokens']} tokens a step, k = "
        f"{result['special_tokens']}, {result['dtype']}; rounds: {rounds}.",
        "",
        "| | seconds a step | tokens/s | memory, MiB |",
        "|---|---|---|---|",
    ]
    for peer in result["rounds"]:
        name = "forward pass of the base, no gradients" if peer == FORWARD else peer
        step, rate, most = (statistics.median(of[peer]) for of in (seconds, rates, memory))
        lines.append(f"| {name} | {step:.3f} | {rate:,.0f} | {most / 2**20:,.0f} |")
    if ADAPTER in rates:
        lines += ["", "| `gem adapter` | measured | aim |", "|---|---|---|"]
        if FORWARD in rates:
            step, most = (ratio(of[ADAPTER], of[FORWARD]) for of in (seconds, memory))
            lines += [
                f"| a step, in forward passes | {step:.2f} | 1.3 |",
                f"| memory, against the forward pass | {most:.2f} | 1.2 |",
            ]
        if ORDINARY in rates:
            faster = ratio(rates[ADAPTER], rates[ORDINARY])
            lines.append(f"| tokens/s, against {ORDINARY} | {faster:.2f} | 2 |")
    return [*lines, "", *about_table(result["about"]), ""]


def ratio(mine: Sequence[float], other: Sequence[float]) -> float:
    """Of one peer's figures to another's in the same rounds, the median.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    return statistics.median(a / b for a, b in zip(mine, other, strict=True))


if __name__ == "__main__":
    run_script(main)
