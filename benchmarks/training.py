"""Training, against a forward pass, an ordinary LoRA fine-tune, and sentence-transformers.

    python benchmarks/training.py --base DIR [--peers PEER ...] [--out benchmarks/results]

Pairs of Wikipedia texts of one length, the same for all; each peer in a process of its own, one
after the other, `--rounds` times. Writes ``training.json`` and ``training.md``, beside what is
there of other bases and processors. About ten minutes on two cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark_script import about, about_table, add_out, hardware, run_script
from engine_facts import TEXTS, read_paragraphs
from training_peers import PEERS
from transformers import AutoTokenizer

from gem_vllm.folders import write_json
from gem_vllm.training.run import compute_dtype

WARM_UP = 2
SCRIPT = Path(__file__).with_name("training_peers.py")
FORWARD, ADAPTER, ORDINARY = "forward", "gem adapter", "Trainer, LoRA"


def main() -> None:
    """Run all peers and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    add_out(parser)
    parser.add_argument("--special-tokens", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=64, help="of every text")
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {peer: [] for peer in args.peers}
    with tempfile.TemporaryDirectory() as work:
        pairs = write_pairs(args, Path(work) / "pairs.jsonl")
        for number in range(args.rounds):
            for peer in args.peers:
                print(f"round {number + 1}: {peer}", file=sys.stderr, flush=True)
                rounds[peer].append(run(peer, args, pairs, Path(work)))
    result = {
        "tokens": args.tokens,
        "pairs": args.batch,
        "special_tokens": args.special_tokens,
        "dtype": str(compute_dtype(args.dtype)).removeprefix("torch."),
        "about": about("torch", "transformers", "peft", "sentence-transformers"),
        "rounds": rounds,
    }
    file = args.out / "training.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    results[f"{args.base.resolve().name}, {hardware()}"] = result
    write_json(file, results)
    (args.out / "training.md").write_text(markdown(results), encoding="utf-8")
    print((args.out / "training.md").read_text())


def write_pairs(args: argparse.Namespace, file: Path) -> Path:
    """Pairs of texts that follow each other, each of ``--tokens`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    stream = [i for row in tokenizer(read_paragraphs(TEXTS))["input_ids"] for i in row]
    pieces = [
        tokenizer.decode(stream[start : start + args.tokens])
        for start in range(0, 2 * args.batch * args.tokens, args.tokens)
    ]
    pairs = zip(pieces[::2], pieces[1::2], strict=True)
    lines = [json.dumps({"anchor": anchor, "positive": positive}) for anchor, positive in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


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
        sys.exit(f"{peer} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["seconds"] = result["seconds"][WARM_UP:]
    return result


def markdown(results: dict[str, Any]) -> str:
    """All results, by base and processor."""
    lines = ["# Training", "", "Medians over steps and rounds. Memory: the most that model and"]
    lines += ["training took.", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", *section(result)]
    return "\n".join(lines)


def section(result: dict[str, Any]) -> list[str]:
    """The table, and those ratios that there are aims for."""
    seconds = {
        peer: statistics.median(s for each in rounds for s in each["seconds"])
        for peer, rounds in result["rounds"].items()
    }
    rates = {peer: rounds[0]["tokens"] / seconds[peer] for peer, rounds in result["rounds"].items()}
    memory = {
        peer: statistics.median(each["peak_bytes"] for each in rounds)
        for peer, rounds in result["rounds"].items()
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
        lines.append(
            f"| {name} | {seconds[peer]:.3f} | {rates[peer]:,.0f} | {memory[peer] / 2**20:,.0f} |"
        )
    if ADAPTER in rates:
        lines += ["", "| `gem adapter` | measured | aim |", "|---|---|---|"]
        if FORWARD in rates:
            step, most = seconds[ADAPTER] / seconds[FORWARD], memory[ADAPTER] / memory[FORWARD]
            lines += [
                f"| a step, in forward passes | {step:.2f} | 1.3 |",
                f"| memory, against the forward pass | {most:.2f} | 1.2 |",
            ]
        if ORDINARY in rates:
            ratio = rates[ADAPTER] / rates[ORDINARY]
            lines.append(f"| tokens/s, against {ORDINARY} | {ratio:.2f} | 2 |")
    return [*lines, "", *about_table(result["about"]), ""]


if __name__ == "__main__":
    run_script(main)
