"""The batch job under kill -9 of a replica, a node and the driver, at random moments.

    python benchmarks/embed_faults.py --data sentences.txt.gz      # about 45 minutes

A tiny random model, so that the faults and not the model take the time; a Ray cluster of a head and
two nodes of one core each; five rounds of each fault, the moment drawn from the round's name. The
last round of each fault has all rows, the others ``--rows-of-a-round``. After a round every id has
to be there once and in order, with the vector of a run without faults, and no process of the job
and no half-written file left. Finished rounds are in ``embed_faults.json``: the same command goes
on behind them. Writes that and ``embed_faults.md`` to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
from benchmark_script import ROOT, about, add_out, run_script, write_result
from embed_faults_job import ENGINE, NODES, Bench, Run
from embed_faults_report import FAULTS, OF_A_RUN, ROUNDS, markdown
from embed_job import read
from raylets import kill, raylets

from gem_vllm.errors import GemError
from gem_vllm.processes import terminated_like_interrupted

MEMORY_ROWS = 10_000
COSINE = 0.9999
SECONDS_TO_END = 60
# Share of the rounds in which the kill comes before the first shard is finished.
KILLED_AT_START = 0.2


def main() -> None:
    """Run what is not done yet, or as much of it as there is time for; write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="texts, one a line, .txt or .gz")
    parser.add_argument("--rows", type=int, default=200_000, help="texts of a long round")
    parser.add_argument("--rows-of-a-round", type=int, default=40_000, help="of the others")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "embed_faults")
    add_out(parser, goes_on=True)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no round after")
    args = parser.parse_args()
    if not MEMORY_ROWS < args.rows_of_a_round <= args.rows:
        raise GemError(f"--rows-of-a-round must be over {MEMORY_ROWS} and at most --rows")
    prepare(args)
    path = args.out / "embed_faults.json"
    now = about("vllm", "ray")
    of_run = {name: now.pop(name) for name in OF_A_RUN}
    fixed = {
        "engine": json.dumps(ENGINE),
        "texts": f"{args.rows} and {args.rows_of_a_round} of {args.data.name}",
    }
    result = json.loads(path.read_text()) if path.is_file() else {"rounds": []}
    if {**result.get("about", {}), **fixed} != result.get("about", fixed):
        raise GemError(f"{path} has rounds of other settings; choose another --out")
    # Rounds that were there before these were kept by round have versions and date in common.
    result["about"] = {**result.get("about", {}), **fixed, **now}
    deadline = time.monotonic() + 60 * args.minutes
    with terminated_like_interrupted(), raylets(NODES) as cluster, ExitStack() as stack:
        bench = Bench(args.work, cluster, of_run, stack)
        for name, todo in rounds_to_do(args, bench, result):
            if time.monotonic() > deadline:
                break
            print(f"{name} ...", flush=True)
            todo()
            print(json.dumps((result["rounds"] or [result["clean"]])[-1]), flush=True)
            write_result(args.out, "embed_faults", result, markdown)


def rounds_to_do(
    args: argparse.Namespace, bench: Bench, result: dict[str, Any]
) -> list[tuple[str, Callable[[], None]]]:
    """The rounds that ``result`` does not have, by name; each adds itself to it."""

    def clean() -> None:
        result["clean"] = run_clean(bench, args.rows)

    def fault(kind: str, number: int, rows: int) -> None:
        result["rounds"].append(run_fault(bench, kind, number, rows, result["clean"]))

    todo: list[tuple[str, Callable[[], None]]] = []
    if "clean" not in result or not (args.work / "clean.npy").is_file():
        todo.append(("no fault", clean))
    done = {(round_["fault"], round_["number"]) for round_ in result["rounds"]}
    for number in (*range(1, ROUNDS), 0):  # the long ones last
        rows = args.rows_of_a_round if number else args.rows
        for kind in FAULTS:
            if (kind, number) not in done:
                todo.append((f"{kind} {number}", lambda k=kind, n=number, r=rows: fault(k, n, r)))
    return todo


def prepare(args: argparse.Namespace) -> None:
    """The model and the texts, in the work folder."""
    sys.path.append(str(ROOT))
    from tests.tiny import make_tiny_checkpoint

    args.work = args.work.absolute()
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "model" / "config.json").is_file():
        make_tiny_checkpoint("llama", args.work / "model", k=1)
    texts = read(args.data, args.rows)
    for rows in {args.rows, args.rows_of_a_round}:
        part = args.work / "texts.tmp"
        part.write_text("".join(f"{text}\n" for text in texts[:rows]), encoding="utf-8")
        part.replace(args.work / f"texts-{rows}.txt")


def run_clean(bench: Bench, rows: int) -> dict[str, Any]:
    """The job without a fault: its vectors, its time and the driver's memory."""
    output = fresh(bench.work / "clean")
    run = Run(bench, rows, output)
    if code := run.wait():
        raise GemError(f"the run without a fault ended with {code}; see above")
    np.save(bench.work / "clean.npy", vectors_of(output, bench.texts(rows)))
    return {
        "rows": rows,
        "seconds": round(run.seconds, 1),
        "first_shard_s": round(run.progress[0][0], 1),
        "driver_mib": driver_memory(run),
        **bench.about,
    }


def run_fault(
    bench: Bench, kind: str, number: int, rows: int, clean: dict[str, Any]
) -> dict[str, Any]:
    """One round: the job, the kill, the same command again where the job ended, the checks."""
    chance = random.Random(f"{kind} {number}")
    output = fresh(bench.work / f"{kind}-{number}")
    while bench.cluster.nodes < NODES:
        bench.cluster.add_node()
    run = Run(bench, rows, output)
    if chance.random() < KILLED_AT_START:
        run.wait(chance.uniform(0, clean["first_shard_s"]))
    else:
        # By what is finished, for a run may be slower than another; then at any point of a shard.
        share = chance.uniform(0, 0.9)
        run.wait(rows=int(share * rows))
        run.wait(run.seconds + chance.uniform(0, 2))
    while kind == "replica" and not bench.cluster.replicas():
        run.wait(run.seconds + 0.1)
    at, finished = run.seconds, run.rows_done()
    if run.process.poll() is not None:
        raise GemError(f"{kind} {number}: the job was over before the kill; give it more rows")
    if kind == "replica":
        kill([chance.choice(bench.cluster.replicas())])
    elif kind == "node":
        bench.cluster.kill_node(chance.randrange(NODES))
    else:
        run.process.kill()
    runs, seconds = [run.wait()], run.seconds
    while runs[-1] != 0:
        if len(runs) == 3:
            raise GemError(f"{kind} {number}: not finished after runs that ended with {runs}")
        run = Run(bench, rows, output)
        runs.append(run.wait())
        seconds += run.seconds
    return {
        "fault": kind,
        "number": number,
        "rows": rows,
        "at_s": round(at, 1),
        "rows_finished_then": finished,
        "exit_codes": runs,
        "seconds": round(seconds, 1),
        "cosine": check(bench, output, rows),
        **bench.about,
    }


def driver_memory(run: Run) -> dict[str, float]:
    """Resident MiB of the driver when `MEMORY_ROWS` were finished, at the end, and at most."""
    memory = [(rows, mib) for _, rows, mib in run.progress if rows >= MEMORY_ROWS]
    return {
        "at": memory[0][1],
        "rows_at": memory[0][0],
        "end": memory[-1][1],
        "rows_end": memory[-1][0],
        "most": max(mib for _, mib in memory),
    }


def check(bench: Bench, output: Path, rows: int) -> float:
    """The lowest cosine to the run without a fault; GemError where anything is not as it must."""
    deadline = time.monotonic() + SECONDS_TO_END
    while bench.cluster.replicas():
        if time.monotonic() > deadline:
            raise GemError(f"{output.name}: processes of the job are left")
        time.sleep(0.2)
    if scraps := list(output.rglob(".*")):
        raise GemError(f"{output.name}: {scraps[0]} is left")
    have = vectors_of(output, bench.texts(rows))
    expected = np.load(bench.work / "clean.npy", mmap_mode="r")[:rows]
    norms = np.linalg.norm(have, axis=1) * np.linalg.norm(expected, axis=1)
    cosine = float(((have * expected).sum(axis=1) / norms).min())
    if not cosine >= COSINE:
        raise GemError(f"{output.name}: cosine {cosine} to the run without a fault")
    return cosine


def vectors_of(output: Path, source: Path) -> np.ndarray:
    """float32 [rows, d] of a finished job; GemError unless every id is there once, in order."""
    parts = sorted(map(str, output.glob("part-*.parquet")))
    table = pyarrow.dataset.dataset(parts).to_table(columns=["id", "embedding"])
    with source.open("rb") as file:
        rows = sum(1 for _ in file)
    if table["id"].to_pylist() != [f"{source}:{i}" for i in range(rows)]:
        raise GemError(f"{output.name}: the ids are not those of {source.name}, once and in order")
    flat = table["embedding"].combine_chunks().flatten().to_numpy()
    return flat.reshape(rows, -1)


def fresh(folder: Path) -> Path:
    """A folder that is not there, whatever an earlier run has left of it."""
    if folder.exists():
        shutil.rmtree(folder)
    return folder


if __name__ == "__main__":
    run_script(main)
