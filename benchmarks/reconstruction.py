"""How much of a text its special tokens hold: decoding it back from them alone, by k and length.

    python benchmarks/reconstruction.py --base DIR --data FILE [--out benchmarks/results]

For each k, trains an adapter by reconstruction alone (text | special tokens | text), then lets the
reference decode texts that training has not seen from the special tokens' keys and values (arXiv
2506.04344, appendix B and table 6). Run it again to go on where it was stopped: with what is not in
``reconstruction.json`` yet, from a training's last checkpoint. Half an hour a k on two cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmark_script import add_out, hardware, run_script
from engine_facts import PROMPTS, read_paragraphs
from tqdm import tqdm

from gem_vllm.folders import write_json
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.training.model_card import command_line, source_commit
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import train

LENGTHS = (4, 8, 16, 32)


def main() -> None:
    """Train, decode, report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", required=True, action="append", help="text to train on")
    add_out(parser)
    parser.add_argument("--work", type=Path, default=Path("runs/reconstruction"))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--texts", type=int, default=50, help="texts of each length")
    args = parser.parse_args()
    file = args.out / "reconstruction.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for k in args.k:
        if str(k) in results:
            continue
        options = options_of(k, args)
        results[str(k)] = measure(options, args.texts)
        write_json(file, results)
        for folder in (options.out, options.run_folder):
            shutil.rmtree(folder)
    (args.out / "reconstruction.md").write_text(markdown(results), encoding="utf-8")


def options_of(k: int, args: argparse.Namespace) -> TrainOptions:
    """A training by reconstruction alone, of k special tokens."""
    return TrainOptions(
        base=args.base,
        data=tuple(args.data),
        out=args.work / f"k{k}",
        special_tokens=k,
        alpha=0.0,
        reconstruction_share=1.0,
        ntp_learning_rate=1e-3,
        max_tokens=2 * max(LENGTHS) + k,
        steps=args.steps,
        save_every=50,
    )


def measure(options: TrainOptions, count: int) -> dict[str, Any]:
    """Exact match and token F1 of so many texts of each length, after the training."""
    commit = source_commit()
    train(options, resume=True)
    reference = ReferenceEmbedder(options.out)
    rows = [reference.tokenizer(text).input_ids for text in read_paragraphs(PROMPTS)]
    rows = [row for row in rows if len(row) >= max(LENGTHS)][:count]
    scores = {}
    for length in LENGTHS:
        texts = [row[:length] for row in rows]
        decoded = [
            reference.decode_from_special_tokens(text, length)
            for text in tqdm(texts, desc=f"k = {options.special_tokens}, {length} tokens")
        ]
        pairs = list(zip(texts, decoded, strict=True))
        scores[str(length)] = {
            "exact": sum(text == found for text, found in pairs) / len(pairs),
            "f1": sum(token_f1(*pair) for pair in pairs) / len(pairs),
        }
    return {
        "scores": scores,
        "texts": len(rows),
        "command": command_line(options),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "commit": commit,
    }


def token_f1(expected: Sequence[int], found: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over tokens, each as often as it occurs."""
    common = sum((Counter(expected) & Counter(found)).values())
    return 2 * common / (len(expected) + len(found))


def markdown(results: dict[str, Any]) -> str:
    """Exact match and token F1, by k and length."""
    lines = [
        "# Decoding a text from its special tokens alone",
        "",
        "Exact match / token F1 of texts that training has not seen, decoded greedily by the",
        "reference in float32; adapter mode, trained by reconstruction alone.",
        "",
        "| k | " + " | ".join(f"{length} tokens" for length in LENGTHS) + " |",
        "|---" * (1 + len(LENGTHS)) + "|",
    ]
    for k, result in sorted(results.items(), key=lambda item: int(item[0])):
        scores = (result["scores"][str(length)] for length in LENGTHS)
        cells = [f"{each['exact']:.2f} / {each['f1']:.2f}" for each in scores]
        lines.append(f"| {k} | {' | '.join(cells)} |")
    about = {
        f"{each['texts']} texts of each length; {each['hardware']}, {each['date']}, commit "
        f"{each['commit']}"
        for each in results.values()
    }
    commands = [each["command"] for each in results.values()]
    return "\n".join([*lines, "", "```", *commands, "```", "", *sorted(about)]) + "\n"


if __name__ == "__main__":
    run_script(main)
