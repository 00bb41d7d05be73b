"""`gem-vllm embed` with one replica against a bare `LLM.embed` loop, and the driver's memory.

    python benchmarks/embed_job.py --checkpoint DIR --data texts.txt.gz      # about 15 minutes

Both embed the same texts with the same engine options, in turns. Rates leave the start of the
engine out: the loop's is taken after a first batch; the job's between two shards in its midst, with
as many others under way. Writes ``embed_job.json`` and ``embed_job.md`` to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from benchmark_script import about, about_table, add_out, in_turn, run_script, write_result

from gem_vllm.errors import GemError
from gem_vllm.machine import serve_dtype, serve_environment
from gem_vllm.serving.job import run_embed_job
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions
from gem_vllm.serving.pool import CALLS_IN_FLIGHT
from gem_vllm.training.data import open_text

TARGET = 0.9
BATCH = 1024
SHARD = 128
# Before the rate on the bare loop's standard output, where vLLM writes too.
RATE = "texts/s: "
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 2048,
    "kv_cache_memory_bytes": 1 << 30,
    "enable_prefix_caching": False,
    "dtype": serve_dtype(),
}


def main() -> None:
    """Measure, print the ratio, write both files; as a child, run the bare loop."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a GEM checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="texts, one a line, .txt or .gz")
    parser.add_argument("--rows", type=int, default=6000, help="texts of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    add_out(parser)
    parser.add_argument("--bare-loop", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rows < 4 * BATCH or args.rounds < 1:
        raise GemError(f"--rows must be {4 * BATCH} or more and --rounds 1 or more")
    texts = read(args.data, args.rows)
    if args.bare_loop:
        print(f"{RATE}{bare_loop(args.checkpoint, texts)}", flush=True)
        return
    result = measure(args, texts)
    write_result(args.out, "embed_job", result, markdown)
    print(markdown(result))


def read(data: Path, rows: int) -> list[str]:
    """The first ``rows`` lines."""
    with open_text(data) as file:
        texts = [line.rstrip("\n") for line in islice(file, rows)]
    if len(texts) < rows:
        raise GemError(f"{data} has {len(texts)} lines; --rows {rows} needs as many")
    return texts


def bare_loop(checkpoint: Path, texts: list[str]) -> float:
    """Texts a second of `LLM.embed` over batches, the first left out."""
    from vllm import LLM

    llm = LLM(str(checkpoint), **ENGINE)
    llm.embed(texts[:BATCH], use_tqdm=False)
    start = time.perf_counter()
    for first in range(BATCH, len(texts), BATCH):
        llm.embed(texts[first : first + BATCH], use_tqdm=False)
    rate = (len(texts) - BATCH) / (time.perf_counter() - start)
    llm.llm_engine.engine_core.shutdown()
    return rate


def job(checkpoint: Path, texts: list[str], folder: Path) -> tuple[float, list[float]]:
    """Texts a second of the job in full swing; the driver's MiB after each shard."""
    source = folder / "texts.txt"
    source.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    reports: list[dict[str, Any]] = []
    memory: list[float] = []

    def report(state: dict[str, Any]) -> None:
        reports.append(state)
        memory.append(psutil.Process().memory_info().rss / 2**20)

    options = EmbedOptions(
        model=checkpoint.absolute(),
        input=str(source),
        output=str(folder / "out"),
        rows_per_shard=SHARD,
    )
    run_embed_job(options, ReplicaOptions(engine=ENGINE), report)
    # At the first report another shard is nearly embedded, and not counted; at the last none is.
    first, last = reports[CALLS_IN_FLIGHT], reports[-1 - CALLS_IN_FLIGHT]
    seconds = last["seconds"] - first["seconds"]
    return (last["rows_done"] - first["rows_done"]) / seconds, memory


def bare_loop_apart(args: argparse.Namespace) -> float:
    """`bare_loop` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--bare-loop"],
        env=serve_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    # Not by its exit status: a vLLM that has done its work may still stumble as it ends.
    found = [line for line in done.stdout.splitlines() if line.startswith(RATE)]
    if not found:
        raise GemError(f"the bare loop failed with status {done.returncode}; see above")
    return float(found[0].removeprefix(RATE))


def measure(args: argparse.Namespace, texts: list[str]) -> dict[str, Any]:
    """Rates of both, in an order that turns round."""
    of_run = about("vllm", "torch", "ray")
    memory: list[float] = []

    def embed_job() -> float:
        with tempfile.TemporaryDirectory() as folder:
            rate, of_shards = job(args.checkpoint, texts, Path(folder))
        memory.extend(of_shards)
        return rate

    ways = {"LLM.embed": lambda: bare_loop_apart(args), "gem-vllm embed": embed_job}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds):
        for name in in_turn(ways, round_):
            rates[name].append(ways[name]())
        print(
            f"round {round_ + 1}: " + ", ".join(f"{k} {v[-1]:.1f}/s" for k, v in rates.items()),
            flush=True,
        )
    return {
        "rates": rates,
        "driver_mib": {"first shard": memory[0], "last shard": memory[-1]},
        "about": {
            **of_run,
            "engine": json.dumps(ENGINE),
            "texts": f"{args.rows} of {args.data.name}, {args.rounds} rounds",
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    rates, memory = result["rates"], result["driver_mib"]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    ratios = sorted(a / b for a, b in zip(rates["gem-vllm embed"], rates["LLM.embed"], strict=True))
    lines = [
        "# The batch job against a bare loop",
        "",
        "| | texts/s, median | rounds |",
        "|---|---|---|",
        *(
            f"| {name} | {medians[name]:.1f} | {', '.join(f'{v:.1f}' for v in values)} |"
            for name, values in rates.items()
        ),
        "",
        f"Ratio, the median of the rounds': **{statistics.median(ratios):.2f}** "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}; target {TARGET}).",
        "",
        f"Driver, resident: {memory['first shard']:.0f} MiB after the first shard of the first "
        f"round, {memory['last shard']:.0f} MiB after the last of the last.",
        "",
        *about_table(result["about"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
