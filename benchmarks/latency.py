"""How long chat waits: behind a text that was just embedded, and beside many that are.

    python benchmarks/latency.py --checkpoint DIR --base DIR [--rounds 3] [--caps TOKENS ...]
        [--out runs/benchmarks]

Two tables, of medians over rounds in which what is compared takes turns. **Ask**: 2,000 tokens are
embedded, then a question is asked about them, and its first token is waited for: with one GEM
engine, whose prefix cache has them, and with an engine of its own for chat, which has not; eight
rounds, of a document each. **Beside**: eight chats at a time are answered while texts to embed are
always waiting, for several values of ``gem_tokens_beside_chat``, and once a round without texts.
About half an hour on two cores without AMX that have nothing else to do. Writes
``latency.json``, ``latency.md`` and ``latency.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmark_script import (
    PLAIN_VLLM,
    about,
    add_out,
    check_models,
    in_turn,
    run_script,
    write_result,
)
from latency_peer import engine, request
from latency_report import DOCUMENT, markdown, plot
from wikipedia_texts import PROMPTS, TEXTS, read_paragraphs, read_texts

from gem_vllm.errors import GemError
from gem_vllm.machine import serve_dtype

QUESTION, DOCUMENTS = 20, 8
WAVES = 3
CAPS = (256, 128, 64, 32, 16)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a GEM checkpoint")
    parser.add_argument("--base", type=Path, required=True, help="the base it was made from")
    parser.add_argument("--rounds", type=int, default=3, help="the settings take turns this often")
    parser.add_argument(
        "--caps",
        type=int,
        nargs="+",
        default=CAPS,
        help="values of gem_tokens_beside_chat, beside none",
    )
    add_out(parser)
    args = parser.parse_args()
    check_models(args.checkpoint, args.base)
    if args.rounds < 1:
        raise GemError(f"--rounds is {args.rounds}; take 3 or more for figures to quote")
    if min(args.caps) < 1:
        raise GemError(f"--caps has {min(args.caps)}; give numbers of tokens from 1 on")
    of_run = about("vllm", "torch", "transformers")
    documents, questions = read_documents(args.base)
    texts = read_texts(args.base)
    with engine(args.checkpoint, {}) as gem, engine(args.base, PLAIN_VLLM) as plain:
        asked = ask(gem, plain, documents, questions)
        load = {"prompts": texts["prompts"], "texts": texts["texts"]["embed 230"]}
        beside = chat_beside(gem, load, args.rounds, args.caps)
    result = {
        "ask": asked,
        "beside": beside,
        "about": {
            **of_run,
            "checkpoint": f"{args.checkpoint.name}; base: {args.base.name}",
            "dtype": serve_dtype(),
            "rounds": f"{DOCUMENTS} of asking, {args.rounds} of chat beside texts",
        },
    }
    write_result(args.out, "latency", result, markdown)
    plot(beside, args.out / "latency.png")
    print(markdown(result))


def read_documents(base: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Documents of 2,000 tokens of Wikipedia, one for each round and one to warm up; questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = [i for row in tokenizer(read_paragraphs(TEXTS))["input_ids"] for i in row]
    others = [i for row in tokenizer(read_paragraphs(PROMPTS))["input_ids"] for i in row]
    return (
        [ids[n * DOCUMENT : (n + 1) * DOCUMENT] for n in range(DOCUMENTS + 1)],
        [others[n * QUESTION : (n + 1) * QUESTION] for n in range(DOCUMENTS + 1)],
    )


def ask(
    gem: Connection, plain: Connection, documents: list[list[int]], questions: list[list[int]]
) -> dict[str, list[float]]:
    """Seconds to the first token, by round, in an order that turns round; the first is left out."""

    def one_engine(document: list[int], question: list[int]) -> float:
        request(gem, "embed", ids=document)
        return request(gem, "first_token", ids=document + question)

    def two_engines(document: list[int], question: list[int]) -> float:
        return request(plain, "first_token", ids=document + question)

    ways = {"one engine": one_engine, "two engines": two_engines}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_, (document, question) in enumerate(zip(documents, questions, strict=True)):
        for name in in_turn(ways, round_):
            seconds[name].append(ways[name](document, question))
    return {name: values[1:] for name, values in seconds.items()}


def chat_beside(
    gem: Connection, load: dict[str, Any], rounds: int, caps: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """Rounds of `latency_peer.beside_texts` by setting, in an order that turns round."""
    settings = {
        "alone": {"cap": None, "with_texts": False},
        **{str(cap): {"cap": cap, "with_texts": True} for cap in (None, *caps)},
    }
    request(gem, "beside", **load, **settings["None"], waves=1)  # to warm up
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in settings}
    for round_ in range(rounds):
        for name in in_turn(settings, round_):
            found[name].append(request(gem, "beside", **load, **settings[name], waves=WAVES))
        print(f"round {round_ + 1} of {rounds}", flush=True)
    return found


if __name__ == "__main__":
    run_script(main)
