"""What one shard costs besides its engine, and where a job over many GPUs would stop scaling.

    python benchmarks/embed_scaling.py      # about 3 minutes

Measures, without an engine: the driver's time for a shard (Ray Data with actors that do nothing),
the writing of a shard of SHARD_ROWS vectors as a replica does it (Parquet, fsync, rename, marker),
and what the driver does for every shard at the start and the end of a job (markers and footers).
From these, and from a GPU's rate that is assumed with ``--rows-per-gpu``, a table by number of
GPUs. Writes ``embed_scaling.json`` and ``embed_scaling.md`` to ``--out``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from benchmark_script import about, about_table, add_out, run_script, write_result

from gem_vllm.errors import GemError
from gem_vllm.serving.job import FOOTER_READERS, SHARD_ROWS
from gem_vllm.serving.manifest import DONE, OutputFolder
from gem_vllm.serving.options import ReplicaOptions
from gem_vllm.serving.pool import map_in_pool, ray_cluster
from gem_vllm.serving.vectors import vector_columns, vector_fields

ROWS = SHARD_ROWS[1]
SIZE = 1024
WRITES = 5
GPUS = (1, 8, 64, 512, 4096)
JOB_ROWS = 1_000_000_000
# Above this share of one core, the driver is what the job waits for.
DRIVER_LIMIT = 0.5


class NoReplica:
    """An actor of the pool without an engine.

    Args:
        engine: ignored.
    """

    def __init__(self, engine: dict[str, Any]) -> None:
        del engine

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """What a replica gives for a shard, at once."""
        return {"rows": [ROWS], "failure": [""], "replica": ["0" * 32]}


def main() -> None:
    """Measure, print the table, write both files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=3000, help="of each measurement")
    parser.add_argument("--rows-per-gpu", type=float, default=2000, help="a second; assumed")
    add_out(parser)
    args = parser.parse_args()
    if args.shards < 100 or args.rows_per_gpu <= 0:
        raise GemError("--shards must be 100 or more and --rows-per-gpu above 0")
    of_run = about("ray", "pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "driver": driver(args.shards),
            "write": write(OutputFolder(f"{folder}/write")),
            "state": state(OutputFolder(f"{folder}/state"), args.shards),
            "rows_per_gpu": args.rows_per_gpu,
            "about": of_run,
        }
    write_result(args.out, "embed_scaling", result, markdown)
    print(markdown(result))


def driver(shards: int) -> dict[str, float]:
    """Seconds for a shard: to give it to Ray Data, and CPU and wall of its way through."""
    replicas = ReplicaOptions(min_replicas=2, max_replicas=2, cpus=1)
    with ray_cluster(replicas):
        items = [
            {"index": i, "file": 0, "start": 0, "stop": ROWS, "url": "x" * 80}
            for i in range(shards)
        ]
        start = time.perf_counter()
        rows = ray.data.from_items(items, override_num_blocks=shards)
        given = time.perf_counter() - start
        mapped = map_in_pool(
            rows, NoReplica, replicas, most_actors=None, batch_size=1, arguments={}
        )
        results = iter(mapped.iter_rows())
        next(results)
        wall, cpu = time.perf_counter(), time.process_time()
        count = sum(1 for _ in results)
        return {
            "given_s": given / shards,
            "cpu_s": (time.process_time() - cpu) / count,
            "wall_s": (time.perf_counter() - wall) / count,
        }


def write(output: OutputFolder) -> dict[str, float]:
    """Seconds and bytes of a shard's file and marker."""
    schema = pa.schema([pa.field("id", pa.int64()), *vector_fields("float32", SIZE)])
    vectors = np.random.default_rng(0).normal(size=(ROWS, SIZE)).astype(np.float32)
    seconds = []
    for i in range(WRITES):
        start = time.perf_counter()
        with (
            output.writing(f"part-{i:05d}.parquet") as path,
            pq.ParquetWriter(path, schema, compression="zstd") as writer,
        ):
            columns = {
                "id": pa.array(range(ROWS)),
                **vector_columns(list(vectors), "float32", SIZE),
            }
            writer.write_table(pa.table(columns, schema=schema))
        output.write_json(f"{DONE}/{i:05d}.json", {"rows": ROWS})
        seconds.append(time.perf_counter() - start)
    size = os.path.getsize(f"{output.path}/part-00000.parquet")
    return {"seconds": float(np.median(seconds)), "bytes": size}


def state(output: OutputFolder, shards: int) -> dict[str, float]:
    """Seconds for a shard of reading the markers, as at a job's start and end."""
    for i in range(shards):
        output.write_json(f"{DONE}/{i:05d}.json", {"rows": ROWS, "embedded": ROWS})
        Path(output.path, f"part-{i:05d}.parquet").touch()
    start = time.perf_counter()
    assert len(output.finished()) == shards
    return {"seconds": (time.perf_counter() - start) / shards}


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    cpu, write_s = result["driver"]["cpu_s"], result["write"]["seconds"]
    rate, mib = result["rows_per_gpu"], result["write"]["bytes"] / 2**20
    embed_s = ROWS / rate
    limit = DRIVER_LIMIT / cpu * ROWS / rate
    lines = [
        "# What a shard costs besides its engine, and where a job stops scaling",
        "",
        f"A shard is {ROWS:,} rows (the most that the job chooses by itself), a vector {SIZE} "
        "float32. Measured on this machine, without an engine:",
        "",
        "| | for a shard |",
        "|---|---|",
        f"| the driver gives it to Ray Data, at the start | "
        f"{1000 * result['driver']['given_s']:.2f} ms |",
        f"| the driver, CPU (Ray Data with actors that do nothing) | {1000 * cpu:.1f} ms |",
        f"| the driver and Ray together, wall | {1000 * result['driver']['wall_s']:.1f} ms |",
        f"| a replica writes {mib:.0f} MiB and the marker, local disk | {write_s:.2f} s |",
        f"| reading the markers, at the start and at the end | "
        f"{1000 * result['state']['seconds']:.2f} ms |",
        "",
        "Rows do not pass the driver or the object store: of a shard, its description and its "
        "counts do. So what a further GPU adds to the shared parts is shards, not rows.",
        "",
        f"With GPUs that embed {rate:,.0f} rows a second each, **which is assumed and not "
        f"measured**, a shard takes a GPU {embed_s:.1f} s:",
        "",
        f"| GPUs | rows/s | driver, share of a core | written, MiB/s | {JOB_ROWS:,} rows |",
        "|---|---|---|---|---|",
        *(
            f"| {n:,} | {rows:,.0f} | {rows / ROWS * cpu:.0%} | {rows / ROWS * mib:,.0f} | "
            f"{JOB_ROWS / rows / 3600:,.2f} h |"
            for n, rows in ((n, min(n * rate, ROWS / cpu)) for n in GPUS)
        ),
        "",
        "Where the driver has all of a core to do, more GPUs bring nothing.",
        "",
        f"- **Driver**: at half a core busy with about {limit:,.0f} GPUs; larger shards "
        "(`--rows-per-shard`) move that out in proportion.",
        f"- **Commit**: no lock and no shared file; each replica writes its own. A write takes "
        f"{write_s / embed_s:.0%} of the time of embedding, beside the engine, which has the next "
        "shard meanwhile. What the storage takes in (the column MiB/s) is the first limit to be "
        "met; `--dtype float16`, `int8` or `binary` move it out by 2, 4 and 32.",
        f"- **Start and end**: the shards of {JOB_ROWS:,} rows are given to Ray Data in "
        f"{JOB_ROWS / ROWS * result['driver']['given_s']:.0f} s, and their markers read in "
        f"{JOB_ROWS / ROWS * result['state']['seconds']:.0f} s on a local disk; footers, and an "
        f"object store's markers, cost a request each, {FOOTER_READERS} at a time for the footers.",
        "- **Tail**: at the end a replica waits for the last shards of the others, at most two "
        f"shards' time ({2 * embed_s:.0f} s here).",
        "",
        *about_table(result["about"]),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
