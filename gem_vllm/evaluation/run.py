"""An evaluation, from its options to its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks import AbsTask

from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import Embedder, ServerEmbedder
from gem_vllm.evaluation.language_tasks import mmlu_tasks, perplexity_tasks
from gem_vllm.evaluation.local_tasks import find_tasks, local_task
from gem_vllm.evaluation.measurements import Measurements, Report
from gem_vllm.evaluation.options import MAY_COME_LATER, PROMPT_TYPES, EvaluateOptions
from gem_vllm.evaluation.report import Column, write_report
from gem_vllm.folders import is_no_room, write_json

BOUND_FILE = "options.json"
REVISION_CHARACTERS = 16
# What is asked of a server, whose checkpoint cannot be seen; one checkpoint's vectors of it agree
# to this cosine, whatever its server's arithmetic.
PROBE = "The old stone bridge crosses the river near the library."
SAME_COSINE = 0.999


def evaluate(options: EvaluateOptions, report: Report = lambda line: None) -> Path:
    """Run what is not done yet, and write the tables; returns the folder.

    In ``options.out``: ``mteb/`` and ``lm_eval/`` with the results of each task as those packages
    write them, ``results.json``, ``results.md`` and ``results.png``.

    Args:
        options: checked here.
        report: called with a line whenever something begins.

    Raises:
        GemError: the evaluation cannot be begun, the folder holds one of something else, or the
            disk is full.
    """
    options.check()
    tasks = _embedding_tasks(options)
    language = _language_tasks(options)
    _check_prompts(options, tasks)
    server: Embedder | None = None
    if options.url is not None:
        server = ServerEmbedder(options.url, options.model, options.api_key)
    measure = Measurements(options, tasks, language, report)
    try:
        bound = _bind(options, server)
        write_report(options, tasks, _columns(options, measure, bound, server))
    except OSError as error:
        if is_no_room(error):
            raise GemError(
                f"the disk of {options.out} is full; what is done is kept: make room, and run the "
                "same command again"
            ) from error
        raise
    return options.out


def _columns(
    options: EvaluateOptions, measure: Measurements, bound: dict[str, Any], server: Embedder | None
) -> list[Column]:
    """Of the base, where it is to be measured, and of the checkpoint or the server."""
    columns = []
    if options.base is not None:
        columns.append(measure.base(options.base, bound["base"][:REVISION_CHARACTERS]))
    if server is None:
        columns.append(measure.checkpoint(bound["model"][:REVISION_CHARACTERS]))
    else:
        columns.append(measure.server(server))
    return columns


def _embedding_tasks(options: EvaluateOptions) -> list[AbsTask]:
    """Tasks by name, of the folder and of mteb."""
    local = find_tasks(options.local) if options.local else {}
    names = options.tasks or tuple(local)
    if options.limit is not None and (foreign := set(names) - local.keys()):
        raise GemError(f"--limit is for tasks of --local; these are mteb's: {', '.join(foreign)}")
    found = []
    for name in names:
        if name in local:
            found.append(local_task(local[name], options.limit))
            continue
        try:
            found.append(mteb.get_task(name))
        except KeyError as error:
            raise GemError(
                f"--task {name}: neither in --local ({', '.join(local) or 'not given'}) nor mteb's"
            ) from error
    return found


def _language_tasks(options: EvaluateOptions) -> dict[str, list[Any]]:
    tasks = {}
    if options.mmlu:
        tasks["mmlu"] = mmlu_tasks(options.mmlu)
    if options.perplexity:
        tasks["perplexity"] = perplexity_tasks(options.perplexity)
    return tasks


def _check_prompts(options: EvaluateOptions, tasks: list[AbsTask]) -> None:
    names = {name for task in tasks for name in (task.metadata.name, task.metadata.type)}
    known = {*names, *PROMPT_TYPES, *(f"{name}-{kind}" for name in names for kind in PROMPT_TYPES)}
    if unknown := options.prompts.keys() - known:
        raise GemError(
            f"--prompts names {', '.join(sorted(unknown))}; of these tasks there are "
            f"{', '.join(sorted(names | set(PROMPT_TYPES)))}, and both joined with -"
        )


def _bind(options: EvaluateOptions, server: Embedder | None) -> dict[str, Any]:
    """Let the folder be this evaluation's, or raise GemError with what differs; to what it is."""
    file = options.out / BOUND_FILE
    bound = json.loads(json.dumps(options.bound()))
    probe = None if server is None else server.embed([PROBE])[0].tolist()
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name in MAY_COME_LATER:
            # Not given now, or not before.
            known = bound[name] or before.get(name)
            bound[name], before[name] = known, before.get(name) or known
        differs = [name for name, value in bound.items() if before.get(name) != value]
        if probe is not None and not _agree(probe, before.get("probe", probe)):
            differs.append("checkpoint behind --url")
        probe = before.get("probe", probe)
        if differs:
            raise GemError(
                f"{options.out} holds an evaluation with another {', '.join(differs)}; choose "
                "another --out"
            )
    elif options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise GemError(f"--out {options.out} holds something else; choose a new or empty folder")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(file, bound if probe is None else {**bound, "probe": probe})
    return bound


def _agree(one: list[float], other: list[float]) -> bool:
    """Whether two vectors are of one checkpoint."""
    if len(one) != len(other):
        return False
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    return bool(np.dot(one, other) >= SAME_COSINE * norms)
