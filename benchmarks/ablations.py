"""What each part of the training recipe brings: a short training for each row, one table.

    python benchmarks/ablations.py --base DIR --paragraphs FILE --sentences FILE --tasks DIR
        [--out benchmarks/results] [--rows NAME ...] [--work runs/ablations] [--keep]

Trains what is not in ``ablations.json`` yet, one row after the other, and measures it on the
development tasks (`development.py`); writes ``ablations.md`` from all that is there. A row takes a
few minutes on two cores; stop it and run it again as you like. Rows of another base, other texts or
tasks belong into another ``--out``, and another ``--work``, where pairs and the model of the row
``base`` stay. Of the rows that are in the repository only ``lora`` and those of words say what they
are of: name an ``--out`` of your own unless it is to go on with those.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ablation_report import markdown
from ablation_rows import GROUPS, RECIPE, Row
from benchmark_script import add_out, check_same_settings, hardware, run_script
from development import CheckpointEmbedder, Prefixes, development_scores

from gem_vllm.errors import GemError
from gem_vllm.folders import content_sha256, read_json, write_json, write_whole
from gem_vllm.machine import has_cuda
from gem_vllm.training.data import open_text
from gem_vllm.training.model_card import command_line, source_commit
from gem_vllm.training.options import TrainOptions, compute_dtype
from gem_vllm.training.pairs import write_pairs
from gem_vllm.training.run import train

MINED_SENTENCES = 20_000
LEAST_KEYWORDS, MOST_KEYWORDS = 3, 12
ASKED_PARAGRAPHS = {"questions": 4096, "questions-16k": 16_000}


def main() -> None:
    """Train, measure, report."""
    args = parse()
    rows = {row.name: row for group in GROUPS.values() for row in group}
    if unknown := set(args.rows or ()) - rows.keys():
        sys.exit(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    file = args.out / "ablations.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    settings = settings_of(args)
    check_same_settings(file, (row.get("settings", {}) for row in results.values()), settings)
    todo = rows_to_do([rows[name] for name in dict.fromkeys(args.rows or rows)], results)
    check_model_of_base(todo, args.work)
    check_work(args.work, settings)
    # Of the code that is loaded now, whatever is edited while it runs.
    commit = source_commit()
    prefixes = {keep: Prefixes(args.base, keep=keep) for keep in (True, False)}
    for row in todo:
        print(f"{row.name}: {row.title}", flush=True)
        result = run(row, args, prefixes)
        results[row.name] = {**result, "settings": settings, "commit": commit}
        write_json(file, results)
        print(result["scores"], flush=True)
    write_whole(args.out / "ablations.md", markdown(results))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--paragraphs", type=Path, required=True, help="text, a paragraph a line")
    parser.add_argument("--sentences", type=Path, required=True, help="text, a sentence a line")
    parser.add_argument("--tasks", type=Path, required=True, help="folder with a folder a task")
    add_out(parser, goes_on=True)
    parser.add_argument("--work", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in --work")
    parser.add_argument("--rows", nargs="+", help="names of rows; all by default")
    args = parser.parse_args()
    for path in (args.base, args.paragraphs, args.sentences, args.tasks):
        if not path.exists():
            parser.error(f"{path} is not there")
    return args


def settings_of(args: argparse.Namespace) -> dict[str, str]:
    """What all rows share, by what it holds, not by where it is."""
    return {
        name: content_sha256(getattr(args, name))
        for name in ("base", "paragraphs", "sentences", "tasks")
    }


def rows_to_do(rows: Iterable[Row], results: Mapping[str, Any]) -> list[Row]:
    """Those that there are no results of, and that this machine can train."""
    todo = []
    for row in rows:
        if row.name in results:
            continue
        if row.on_gpu and not has_cuda():
            print(f"{row.name}: left out, it is trained on a GPU and there is none", flush=True)
            continue
        todo.append(row)
    return todo


def check_model_of_base(todo: Sequence[Row], work: Path) -> None:
    """Raise GemError where a row needs the model of the row ``base``, and there is none."""
    for number, row in enumerate(todo):
        trained = "base" in {each.name for each in todo[:number]} or (work / "base").is_dir()
        mines = row.pairs == "mined" and not pairs_file("mined", work).is_file()
        if (mines or row.taught) and not trained:
            raise GemError(
                f"the row {row.name} needs the model of the row base, and {work / 'base'} is not "
                f"there; give --rows base {row.name}, and an --out without results of base"
            )


def check_work(work: Path, settings: Mapping[str, str]) -> None:
    """Raise GemError where ``work`` has pairs, or a model, of another base or other texts."""
    file = work / "settings.json"
    own = {name: value for name, value in settings.items() if name != "tasks"}
    recorded = [read_json(file)] if file.is_file() else []
    check_same_settings(file, recorded, own, option="--work")
    work.mkdir(parents=True, exist_ok=True)
    write_json(file, own)


def run(row: Row, args: argparse.Namespace, prefixes: dict[bool, Prefixes]) -> dict[str, Any]:
    """Train and measure one row."""
    changes: dict[str, Any] = {**RECIPE, **row.changes}
    if row.pairs:
        changes["pairs"] = str(make_pairs(row.pairs, args))
    if row.taught:
        changes["teacher"] = args.work / "base"
    options = TrainOptions(
        base=args.base,
        data=tuple(map(str, texts_of(row, args))),
        out=args.work / row.name,
        save_every=changes["steps"],
        **changes,
    )
    train(options, overwrite=True)
    dtype = compute_dtype("auto")
    embedder = CheckpointEmbedder(options.out, prefixes[options.mode == "adapter"], dtype=dtype)
    result = {
        "command": command_line(options),
        "scores": development_scores(embedder, args.tasks),
        "dimensions": {},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    for size in row.dimensions:
        embedder.dimensions = size
        result["dimensions"][str(size)] = development_scores(embedder, args.tasks)
    if row.name != "base" and not args.keep:  # that one mines and teaches
        shutil.rmtree(options.out)
    return result


def texts_of(row: Row, args: argparse.Namespace) -> list[Path]:
    """What it is trained on."""
    if row.documents_of is None:
        return [args.paragraphs, args.sentences]
    return list((args.tasks / row.documents_of).glob("corpus.jsonl*"))


def make_pairs(kind: str, args: argparse.Namespace) -> Path:
    """A file for ``--pairs``, made once."""
    file = pairs_file(kind, args.work)
    if not file.is_file():
        if kind in ASKED_PARAGRAPHS:
            questions(args, file, ASKED_PARAGRAPHS[kind])
        else:
            {"lead": lead, "keywords": keywords, "mined": mined}[kind](args, file)
    return file


def pairs_file(kind: str, work: Path) -> Path:
    """Where pairs of a kind are kept."""
    return work / f"{kind}.jsonl.gz"


def lead(args: argparse.Namespace, file: Path) -> None:
    """A paragraph's first sentence, and the rest of it: Wikipedia's nearest to title and body."""

    def rows() -> Iterator[dict[str, str]]:
        with open_text(args.paragraphs) as lines:
            for line in lines:
                first, *rest = re.split(r"(?<=[.!?]) (?=[A-Z])", line.strip(), maxsplit=1)
                if rest and len(rest[0].split()) >= 8:
                    yield {"anchor": first, "positive": rest[0]}

    write_pairs(file, rows())


def keywords(args: argparse.Namespace, file: Path) -> None:
    """A few words of a paragraph, the likelier the rarer they are in others, and the paragraph."""
    with open_text(args.paragraphs) as lines:
        paragraphs = [line.strip() for line in lines]
    seen_in = Counter(word for each in paragraphs for word in set(words(each)))
    rng = random.Random(0)

    def rows() -> Iterator[dict[str, str]]:
        for paragraph in paragraphs:
            # The first of each word, in the paragraph's order.
            found = list(dict.fromkeys(words(paragraph)))
            if len(found) < 2 * MOST_KEYWORDS:
                continue
            rarity = [math.log(len(paragraphs) / seen_in[word]) for word in found]
            # Weighted sampling without replacement (Efraimidis and Spirakis, 2006).
            keys = [rng.random() ** (1 / weight) if weight else 0.0 for weight in rarity]
            chosen = sorted(range(len(found)), key=keys.__getitem__, reverse=True)
            kept = sorted(chosen[: rng.randint(LEAST_KEYWORDS, MOST_KEYWORDS)])
            yield {"anchor": " ".join(found[i] for i in kept), "positive": paragraph}

    write_pairs(file, rows())


def words(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def questions(args: argparse.Namespace, file: Path, count: int) -> None:
    """Of the first paragraphs, by the base."""
    texts = ["--texts", count]
    command("questions", "--base", args.base, "--data", args.paragraphs, *texts, "--out", file)


def mined(args: argparse.Namespace, file: Path) -> None:
    """Near neighbours of the first sentences, by the recipe's own model."""
    texts, vectors = args.work / "sentences.txt", args.work / "vectors"
    with open_text(args.sentences) as lines, texts.open("w", encoding="utf-8") as out:
        out.writelines(line for _, line in zip(range(MINED_SENTENCES), lines, strict=False))
    model = args.work / "base"
    command("embed", "--model", model, "--input", texts, "--keep", "text", "--output", vectors)
    command("mine", vectors, "--out", file)


def command(*words: object) -> None:
    """A subcommand of ``gem-vllm``, which says itself why it fails."""
    done = subprocess.run([sys.executable, "-m", "gem_vllm.cli", *map(str, words)], check=False)
    if done.returncode:
        raise GemError(f"gem-vllm {words[0]} failed with {done.returncode}; see above")


if __name__ == "__main__":
    run_script(main)
