"""How much of a text its special tokens hold: decoding it back from them alone, by k and length.

    python benchmarks/reconstruction.py --base DIR --data FILE [--out benchmarks/results]

For each k, trains an adapter by reconstruction alone (text | special tokens | text), then lets the
reference decode texts that training has not seen from the special tokens' keys and values (arXiv
2506.04344, appendix B and table 6). Run it again to go on where it was stopped: with what is not in
``reconstruction.json`` yet, from a training's last checkpoint. Half an hour a k on two cores. Those
of another base, other data, steps or texts belong into another ``--out``; of the ones that are in
the repository only k = 2 and 8 say what they are of.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from benchmark_script import (
    add_out,
    check_same_settings,
    hardware,
    run_script,
    table_row,
)
from tqdm import tqdm
from transformers import AutoTokenizer
from wikipedia_texts import PROMPTS, read_paragraphs

from gem_vllm.errors import GemError
from gem_vllm.folders import content_sha256, read_json, write_json, write_whole
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
    add_out(parser, goes_on=True)
    parser.add_argument("--work", type=Path, default=Path("runs/reconstruction"))
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--texts", type=int, default=50, help="texts of each length")
    args = parser.parse_args()
    settings = settings_of(args)
    file = args.out / "reconstruction.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    check_same_settings(file, (each.get("settings", {}) for each in results.values()), settings)
    # Of the code that is loaded now, whatever is edited while it runs.
    commit = source_commit() or "unknown"
    for k in args.k:
        if str(k) in results:
            continue
        options = options_of(k, args)
        commits = commits_of(options.run_folder, commit)
        measured = measure(options, args.texts)
        results[str(k)] = {**measured, "commit": commits, "settings": settings}
        write_json(file, results)
        for folder in (options.out, options.run_folder):
            shutil.rmtree(folder)
    rows = held_back(AutoTokenizer.from_pretrained(args.base), args.texts)
    write_whole(args.out / "reconstruction.md", markdown(results, rows))


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What every k shares; files by what they hold, a data set by its name."""
    if not args.base.is_dir():
        raise GemError(f"--base {args.base} is not a folder; name a model folder here")
    return {
        "base": content_sha256(args.base),
        "data": [
            content_sha256(Path(spec)) if os.path.isfile(spec) else spec for spec in args.data
        ],
        "steps": args.steps,
        "texts": args.texts,
    }


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
    train(options, resume=True)
    reference = ReferenceEmbedder(options.out)
    rows = held_back(reference.tokenizer, count)
    scores = {}
    for length in LENGTHS:
        texts = [row[:length] for row in rows]
        decoded = [
            reference.decode_from_special_tokens(text, length)
            for text in tqdm(texts, desc=f"k = {options.special_tokens}, {length} tokens")
        ]
        scores[str(length)] = scores_of(list(zip(texts, decoded, strict=True)))
    return {
        "scores": scores,
        "texts": len(rows),
        "command": command_line(options),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
    }


def commits_of(run: Path, commit: str) -> str:
    """What a training is of: this commit, behind those that it was begun and gone on with at."""
    file = run / "commits.json"
    begun = ["unknown"] if run.is_dir() else []
    commits = read_json(file)["commits"] if file.is_file() else begun
    if commit not in commits:
        commits.append(commit)
        run.mkdir(parents=True, exist_ok=True)
        write_json(file, {"commits": commits})
    return ", then ".join(commits)


def held_back(tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of so many texts that training has not seen, each long enough."""
    rows = [tokenizer(text).input_ids for text in read_paragraphs(PROMPTS)]
    return [row for row in rows if len(row) >= max(LENGTHS)][:count]


def scores_of(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Exact match and token F1 of pairs of a text and what was found of it, by token ids."""
    return {
        "exact": mean(text == found for text, found in pairs),
        "f1": mean(token_f1(text, found) for text, found in pairs),
    }


def token_f1(expected: Sequence[int], found: Sequence[int]) -> float:
    """Harmonic mean of precision and recall over tokens, each as often as it occurs."""
    common = sum((Counter(expected) & Counter(found)).values())
    return 2 * common / (len(expected) + len(found))


def markdown(results: dict[str, Any], rows: Sequence[list[int]]) -> str:
    """The scores by k and length; beside them, those of each text of ``rows`` and the next."""
    others = {
        str(length): scores_of([(a[:length], b[:length]) for a, b in pairwise(rows)])
        for length in LENGTHS
    }
    lines = [
        "# Decoding a text from its special tokens alone",
        "",
        "Exact match / token F1 of texts that training has not seen, decoded greedily by the",
        "reference in float32; adapter mode, trained by reconstruction alone. Another text is what",
        "common words alone give.",
        "",
        table_row(["k", *(f"{length} tokens" for length in LENGTHS)]),
        "|---" * (1 + len(LENGTHS)) + "|",
        table_row(["another text", *figures(others)]),
    ]
    by_k = sorted(results.items(), key=lambda item: int(item[0]))
    lines += [table_row([k, *figures(result["scores"])]) for k, result in by_k]
    about: dict[str, list[str]] = {}
    for k, each in by_k:
        where = f"{each['hardware']}, {each['date']}, commit {each['commit']}"
        about.setdefault(f"{each['texts']} texts of each length; {where}", []).append(k)
    commands = [result["command"] for _, result in by_k]
    shown = [f"- k = {', '.join(of)}: {text}" for text, of in about.items()]
    return "\n".join([*lines, "", "```", *commands, "```", "", *shown]) + "\n"


def figures(scores: dict[str, dict[str, float]]) -> list[str]:
    """Both scores at each length."""
    found = (scores[str(length)] for length in LENGTHS)
    return [f"{each['exact']:.2f} / {each['f1']:.2f}" for each in found]


if __name__ == "__main__":
    run_script(main)
