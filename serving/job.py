"""The batch job: `Replica`s in a Ray Data actor pool write shards until all are there.

What flows through Ray Data is which shards to do and what became of them; rows stay in the replica
that reads, embeds and writes them. So neither the driver nor the object store grows with the input,
and a replica, a node or the driver that dies costs the shards it had not finished: Ray gives them
to another replica, or the next run of the same command does them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
import ray

from gem_vllm.compat import installed_vllm
from gem_vllm.errors import GemError
from gem_vllm.folders import content_sha256
from gem_vllm.machine import check_engine_options, is_cpu_build
from gem_vllm.serving.columnar import Extent
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import InputFile, column_types, count_rows, list_files, would_read
from gem_vllm.serving.manifest import DONE, SUMMARY, OutputFolder
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions
from gem_vllm.serving.plan import Plan, Shard, fingerprint, make_plan
from gem_vllm.serving.pool import CALLS_IN_FLIGHT, map_in_pool, ray_cluster
from gem_vllm.serving.replica import COUNTS, Replica, shard_rows

SHARDS_PER_REPLICA = 16
SHARD_ROWS = (512, 20_000)
FOOTER_READERS = 16
COUNTING_TASKS = 32

Report = Callable[[dict[str, Any]], None]


def run_embed_job(
    options: EmbedOptions, replicas: ReplicaOptions, report: Report = lambda progress: None
) -> dict[str, Any]:
    """Embed all rows of the input, or go on with what an earlier run has left.

    A process that runs several jobs had better call `ray.init` itself, once: each session of Ray
    2.60 behind the first leaves a thread that exports metrics, and may crash as the process ends.

    Args:
        options: what to do; checked here.
        replicas: by how many engines, with what.
        report: called with "rows", "rows_done", "rows_now" (of this run), "tokens_now",
            "seconds" and "replicas" (at work) whenever a shard is finished.

    Returns:
        The summary, as written to `manifest.SUMMARY`.

    Raises:
        GemError: the job cannot be begun; nothing was written.
        JobError: it could not go on, or its counts do not add up; what is finished stays.
    """
    options.check()
    replicas.check()
    if installed_vllm() is not None:  # A cluster may have it where this machine has not.
        check_engine_options(replicas.engine)
    files = list_files(options.input)
    types = column_types(files, options.columns())
    output = OutputFolder(options.output)
    if would_read(options.input, f"{options.output}/part-00000.parquet"):
        raise GemError(
            f"--output {options.output} is in --input {options.input}: what is written would be "
            "read; choose another folder"
        )
    start = time.monotonic()
    bound = {
        "input": fingerprint(files),
        "checkpoint": content_sha256(options.model),
        "options": {**options.decisive(), **replicas.decisive()},
    }

    def new_plan() -> Plan:
        extents = _count(files)
        rows = sum(extent.rows for extent in extents)
        chosen = options.rows_per_shard or min(
            max(rows // (SHARDS_PER_REPLICA * replicas.max_replicas), SHARD_ROWS[0]),
            SHARD_ROWS[1],
        )
        return make_plan(bound, files, extents, chosen)

    with ray_cluster(replicas), output.open_plan(bound, new_plan) as plan:
        output.remove_scraps()
        done = output.finished()
        rows_before = sum(counts["rows"] for counts in done.values())
        pending = [shard for shard in plan.shards if shard.index not in done]
        now = {"rows": 0, "tokens": 0}
        # Who is at work is among these; who has died is soon not.
        latest: deque[str] = deque(maxlen=2 * CALLS_IN_FLIGHT * replicas.max_replicas)
        for counts in _write(pending, plan, options, replicas, types) if pending else ():
            latest.append(counts["replica"])
            for key in now:
                now[key] += int(counts[key])
            report(
                {
                    "rows": plan.rows,
                    "rows_done": rows_before + now["rows"],
                    "rows_now": now["rows"],
                    "tokens_now": now["tokens"],
                    "seconds": time.monotonic() - start,
                    "replicas": len(set(latest)),
                }
            )
        output.remove_scraps()
        _check_unchanged(plan, options)
        summary = _summary(output, plan, options)
        summary["this_run"] = {**now, "seconds": round(time.monotonic() - start, 3)}
        output.write_json(SUMMARY, summary)
    return summary


def _count(files: list[InputFile]) -> list[Extent]:
    """Rows of each file, by a few tasks of the cluster, which gets no nodes for the many files."""

    def count(some: list[InputFile]) -> list[Extent]:
        with ThreadPoolExecutor(FOOTER_READERS) as threads:
            return list(threads.map(count_rows, some))

    size = -(-len(files) // COUNTING_TASKS)
    task = ray.remote(count)
    try:
        found = ray.get([task.remote(files[i : i + size]) for i in range(0, len(files), size)])
        return [extent for extents in found for extent in extents]
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, GemError):
            # Without the traceback, which is in the text of Ray's own.
            raise error.cause from None
        raise


def _write(
    pending: list[Shard],
    plan: Plan,
    options: EmbedOptions,
    replicas: ReplicaOptions,
    types: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Write shards; yields what `Replica` gives for each, as they are finished."""
    rows = ray.data.from_items(shard_rows(pending, plan.files), override_num_blocks=len(pending))
    finished = map_in_pool(
        rows,
        Replica,
        replicas,
        most_actors=len(pending),
        batch_size=1,
        arguments={
            "options": options,
            "bound": plan.bound,
            "types": types,
            "cpu_build": is_cpu_build(),
        },
    )
    try:
        for counts in finished.iter_rows():
            if counts["failure"]:
                raise JobError(counts["failure"])
            yield counts
    except ray.exceptions.ActorDiedError as error:
        raise JobError(
            "a replica died again and again, for lack of memory or with its nodes; run the same "
            f"command again to go on: {_last_line(error)}"
        ) from error
    except ray.exceptions.RayError as error:
        raise JobError(_last_line(error)) from error


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _check_unchanged(plan: Plan, options: EmbedOptions) -> None:
    """JobError where an input file is another than when the job was planned."""
    there = set(list_files(options.input))
    if changed := [file.url for file in plan.files if file not in there]:
        raise JobError(
            f"{changed[0]} has changed while the job ran ({len(changed)} of {len(plan.files)} "
            "files have): what was read of it may be of either; choose another --output"
        )


def _summary(output: OutputFolder, plan: Plan, options: EmbedOptions) -> dict[str, Any]:
    """The job's counts, from the finished shards; JobError unless they and the files agree."""
    done = output.finished()
    totals = {key: sum(counts[key] for counts in done.values()) for key in COUNTS}
    missing = [shard.name for shard in plan.shards if shard.index not in done]
    if missing:
        raise JobError(
            f"{len(missing)} of {len(plan.shards)} shards are not finished (first: {missing[0]}); "
            "run the same command again to go on"
        )

    def written(shard: Shard) -> int:
        with output.fs.open(f"{output.path}/part-{shard.name}.parquet", "rb") as file:
            return int(pq.read_metadata(file).num_rows)

    with ThreadPoolExecutor(FOOTER_READERS) as pool:
        in_files = sum(pool.map(written, plan.shards))
    expected = totals["rows"] if options.on_error == "null" else totals["embedded"]
    if totals["rows"] != plan.rows or totals["embedded"] + totals["reported"] != plan.rows:
        raise JobError(f"the input has {plan.rows} rows, the shards' counts in {DONE} are {totals}")
    if in_files != expected:
        raise JobError(f"the files hold {in_files} rows, {expected} were counted as written")
    return {
        "rows_in": plan.rows,
        "rows_embedded": totals["embedded"],
        "rows_reported": totals["reported"],
        "rows_written": in_files,
        "tokens": totals["tokens"],
        "shards": len(plan.shards),
        "vector": {"dtype": options.dtype, "size": options.vector_size()},
        "checkpoint_sha256": plan.bound["checkpoint"],
    }
