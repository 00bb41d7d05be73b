"""The result of `embed_faults.py` as a page."""

from __future__ import annotations

from typing import Any

from benchmark_script import about_table

FAULTS = {
    "replica": "kill -9 of a replica",
    "node": "kill -9 of a node: raylet, agents, workers",
    "driver": "kill -9 of the driver",
}
ROUNDS = 5
# What `benchmark_script.about` says that is kept with each round.
OF_A_RUN = ("hardware", "commit", "versions", "date")


def markdown(result: dict[str, Any]) -> str:
    """Markdown of ``result``, which may lack rounds that are not done yet."""
    clean, rounds = result["clean"], result["rounds"]
    memory = clean["driver_mib"]
    common = result["about"]
    of_runs = {
        name: "; ".join(dict.fromkeys(run.get(name) or common[name] for run in (clean, *rounds)))
        for name in OF_A_RUN
    }
    lines = [
        "# The batch job under kill -9",
        "",
        f"{len(rounds)} of {ROUNDS * len(FAULTS)} rounds done. After every round in the table each "
        "id was there once and in order, no process of the job and no half-written file was left; "
        "the cosine is the lowest to a run without a fault, over all rows.",
        "",
        "| fault | rows | killed after | finished then | exit codes | seconds | cosine, lowest |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {FAULTS[run['fault']]} | {run['rows']:,} | {run['at_s']:.0f} s | "
            f"{run['rows_finished_then']:,} rows | {', '.join(map(str, run['exit_codes']))} | "
            f"{run['seconds']:.0f} | {run['cosine']:.6f} |"
            for kind in FAULTS
            for run in rounds
            if run["fault"] == kind
        ),
        "",
        "Exit codes: of the first run, and of the same command run again where there is a second.",
        "",
        f"Without a fault: {clean['rows']:,} rows in {clean['seconds']:.0f} s, of which "
        f"{clean['first_shard_s']:.0f} until the first shard. Driver, resident: "
        f"**{memory['at']:.0f} MiB** at {memory['rows_at']:,} rows, **{memory['end']:.0f} MiB** at "
        f"{memory['rows_end']:,}, {memory['most']:.0f} at most between.",
        "",
        *about_table({**common, **of_runs}),
        "",
    ]
    return "\n".join(lines)
