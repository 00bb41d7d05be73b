"""An evaluation, from its options to its tables: task by task, each kept when it is done."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mteb
import numpy as np
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.cache import ResultCache

from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import (
    Embedder,
    EngineEmbedder,
    GemEncoder,
    ServerEmbedder,
    model_meta,
)
from gem_vllm.evaluation.language import load_named, run_language_tasks
from gem_vllm.evaluation.language_tasks import mmlu_tasks, perplexity_tasks
from gem_vllm.evaluation.local_tasks import find_tasks, local_task
from gem_vllm.evaluation.mean_pooling import MeanEmbedder
from gem_vllm.evaluation.options import MAY_COME_LATER, MMLU_SHOTS, PROMPT_TYPES, EvaluateOptions
from gem_vllm.evaluation.report import Column, write_report
from gem_vllm.folders import write_json
from gem_vllm.machine import engine_workers, environment, serve_environment

BOUND_FILE = "options.json"
REVISION_CHARACTERS = 16
# What is asked of a server, whose checkpoint cannot be seen; one checkpoint's vectors of it agree
# to this cosine, whatever its server's arithmetic.
PROBE = "The old stone bridge crosses the river near the library."
SAME_COSINE = 0.999
# Examples before each question, by kind of language task; others have their tasks' own number.
SHOTS = {"mmlu": MMLU_SHOTS}

Report = Callable[[str], None]


def evaluate(options: EvaluateOptions, report: Report = lambda line: None) -> Path:
    """Run what is not done yet, and write the tables; returns the folder.

    In ``options.out``: ``mteb/`` and ``lm_eval/`` with the results of each task as those packages
    write them, ``results.json``, ``results.md`` and ``results.png``.

    Args:
        options: checked here.
        report: called with a line whenever something begins.

    Raises:
        GemError: the evaluation cannot be begun, or the folder holds one of something else.
    """
    options.check()
    tasks = _embedding_tasks(options)
    language = _language_tasks(options)
    _check_prompts(options, tasks)
    server: Embedder | None = None
    if options.url is not None:
        server = ServerEmbedder(options.url, options.model, options.api_key)
    bound = _bind(options, server)
    fetch = functools.cache(lambda: _fetch(tasks, language))
    columns = []
    if options.base is not None:
        revision = bound["base"][:REVISION_CHARACTERS]
        columns.append(
            _base_column(options, options.base, revision, tasks, language, fetch, report)
        )
    if server is None:
        revision = bound["model"][:REVISION_CHARACTERS]
        columns.append(_gem_column(options, revision, tasks, language, fetch, report))
    else:
        columns.append(_served_column(options, server, tasks, fetch, report))
    write_report(options, tasks, columns)
    return options.out


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


def _fetch(tasks: list[AbsTask], language: dict[str, list[Any]]) -> None:
    """Download what is not here yet, so that a missing network is known before long work.

    The data are let go of again, and loaded from the disk when their task's turn comes.
    """
    name = ""
    try:
        for task in tasks:
            name = f"--task {task.metadata.name}"
            parts = task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]
            for part in parts:
                if not part.data_loaded:
                    part.load_data()
                    part.unload_data()
        for kind, configs in language.items():
            name = f"--{kind} hub"
            load_named(configs)
    except (OSError, httpx.HTTPError) as error:
        raise GemError(
            f"the data of {name} cannot be loaded: {error}; they are downloaded: check the network"
        ) from error


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


def _base_column(
    options: EvaluateOptions,
    base: Path,
    revision: str,
    tasks: list[AbsTask],
    language: dict[str, list[Any]],
    fetch: Callable[[], None],
    report: Report,
) -> Column:
    name = base.resolve().name
    column = Column("base", name, {}, {})

    def embedder() -> Embedder:
        report(f"{name}: mean pooling of the base, float32")
        return MeanEmbedder(base, options.engine_options()["max_model_len"])

    _embed(options, tasks, column, embedder, f"{name}-mean", revision, fetch)
    # A GPU's memory is the engine's from here on.
    gc.collect()
    torch.cuda.empty_cache()
    with _lazy_engine(options, str(base), fetch, report) as engine:
        _speak(options, language, column, engine, f"{name}-{revision}")
    return column


def _gem_column(
    options: EvaluateOptions,
    revision: str,
    tasks: list[AbsTask],
    language: dict[str, list[Any]],
    fetch: Callable[[], None],
    report: Report,
) -> Column:
    name = Path(options.model).name
    column = Column("gem", name, {}, {})
    with _lazy_engine(options, options.model, fetch, report) as engine:
        _embed(options, tasks, column, lambda: EngineEmbedder(engine()), name, revision, fetch)
        _speak(options, language, column, engine, f"{name}-{revision}")
    return column


def _served_column(
    options: EvaluateOptions,
    server: Embedder,
    tasks: list[AbsTask],
    fetch: Callable[[], None],
    report: Report,
) -> Column:
    name = Path(options.model).name
    column = Column("gem", name, {}, {})
    report(f"{name}: embeddings from {options.url}")
    _embed(options, tasks, column, lambda: server, name, "served", fetch)
    return column


def _embed(
    options: EvaluateOptions,
    tasks: list[AbsTask],
    column: Column,
    embedder: Callable[[], Embedder],
    name: str,
    revision: str,
    fetch: Callable[[], None],
) -> None:
    """Run the embedding tasks, and of those with several parts the parts, that have no result."""
    cache = ResultCache(options.out / "mteb")
    meta = model_meta(name, revision, options.prompts)
    encoder: GemEncoder | None = None
    for task in tasks:
        result = cache.load_task_result(task.metadata.name, meta)
        known = result is not None and result.dataset_revision == task.metadata.revision
        if not known or result.get_missing_evaluations(task):
            if encoder is None:
                fetch()
                encoder = GemEncoder(embedder(), name, revision, options.prompts)
            (result,) = mteb.evaluate(
                encoder,
                task,
                cache=cache,
                overwrite_strategy="only-missing" if known else "always",
                co2_tracker=False,
                show_progress_bar=False,
            ).task_results
            encoder.forget()
        column.embedding[task.metadata.name] = float(result.main_score)


def _speak(
    options: EvaluateOptions,
    tasks: dict[str, list[Any]],
    column: Column,
    engine: Callable[[], Any],
    name: str,
) -> None:
    """Run the language tasks that have no result yet."""
    folder = options.out / "lm_eval" / name
    for kind, configs in tasks.items():
        file = folder / f"{kind}.json"
        if not file.is_file():
            result = run_language_tasks(engine(), configs, options.limit, SHOTS.get(kind))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, result)
        column.language[kind] = json.loads(file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _lazy_engine(
    options: EvaluateOptions, model: str, fetch: Callable[[], None], report: Report
) -> Iterator[Callable[[], Any]]:
    """A function for the engine of a model, which is started when it is first asked for."""
    started: list[Any] = []

    def engine() -> Any:
        if not started:
            fetch()
            report(f"{Path(model).name}: starting vLLM")
            from vllm import LLM

            with environment(serve_environment(engine_workers(options.engine))):
                started.append(LLM(model, **options.engine_options()))
        return started[0]

    try:
        yield engine
    finally:
        for llm in started:
            llm.llm_engine.engine_core.shutdown()
