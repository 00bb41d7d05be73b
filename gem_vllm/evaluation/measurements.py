"""What an evaluation measures of a model: task by task, each kept when it is done."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import mteb
import torch
from mteb.abstasks import AbsTask
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.cache import ResultCache
from mteb.models.model_meta import ModelMeta

from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import Embedder, EngineEmbedder, GemEncoder, model_meta
from gem_vllm.evaluation.language import load_named, run_language_tasks
from gem_vllm.evaluation.mean_pooling import MeanEmbedder
from gem_vllm.evaluation.options import MMLU_SHOTS, EvaluateOptions
from gem_vllm.evaluation.report import Column
from gem_vllm.folders import folder_name, write_json
from gem_vllm.machine import engine_workers, environment, serve_environment

# Examples before each question, by kind of language task; others have their tasks' own number.
SHOTS = {"mmlu": MMLU_SHOTS}

Report = Callable[[str], None]
Engine = Callable[[], Any]


class Measurements:
    """Of one evaluation; what its folder has already is read from there.

    Args:
        options: checked.
        tasks: for embeddings.
        language: kind to lm-eval's tasks.
        report: called with a line whenever something begins.
    """

    def __init__(
        self,
        options: EvaluateOptions,
        tasks: list[AbsTask],
        language: dict[str, list[Any]],
        report: Report,
    ) -> None:
        self._options, self._tasks, self._language = options, tasks, language
        self._report = report
        self._fetched = False

    def base(self, folder: Path, revision: str) -> Column:
        """Mean pooling of the base, and the base as an LLM.

        Args:
            folder: the base's.
            revision: of its contents.
        """
        name = folder_name(folder)
        column = Column("base", name, {}, {})

        def embedder() -> Embedder:
            self._report(f"{name}: mean pooling of the base, float32")
            return MeanEmbedder(folder, self._options.engine_options()["max_model_len"])

        self._embed(column, embedder, f"{name}-mean", revision)
        # A GPU's memory is the engine's from here on.
        gc.collect()
        torch.cuda.empty_cache()
        with self._lazy_engine(str(folder)) as engine:
            self._speak(column, engine, f"{name}-{revision}")
        return column

    def checkpoint(self, revision: str) -> Column:
        """The GEM checkpoint, both of its tasks on one engine; ``revision`` is of its contents."""
        name = self._options.model_name
        column = Column("gem", name, {}, {})
        with self._lazy_engine(self._options.model) as engine:
            self._embed(column, lambda: EngineEmbedder(engine()), name, revision)
            self._speak(column, engine, f"{name}-{revision}")
        return column

    def server(self, server: Embedder) -> Column:
        """The embeddings of a server."""
        name = self._options.model_name
        column = Column("gem", name, {}, {})
        self._report(f"{name}: embeddings from {self._options.url}")
        self._embed(column, lambda: server, name, "served")
        return column

    def _embed(
        self, column: Column, embedder: Callable[[], Embedder], name: str, revision: str
    ) -> None:
        """Run the embedding tasks, and of those with several parts the parts, without a result."""
        prompts = self._options.prompts
        cache = ResultCache(self._options.out / "mteb")
        meta = model_meta(name, revision, prompts)
        encoder: GemEncoder | None = None
        for task in self._tasks:
            result = _kept_result(cache, task, meta)
            known = result is not None and result.dataset_revision == task.metadata.revision
            if not known or result.get_missing_evaluations(task):
                if encoder is None:
                    self._fetch()
                    encoder = GemEncoder(embedder(), name, revision, prompts)
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

    def _speak(self, column: Column, engine: Engine, name: str) -> None:
        """Run the language tasks that have no result yet."""
        folder = self._options.out / "lm_eval" / name
        for kind, configs in self._language.items():
            file = folder / f"{kind}.json"
            if not file.is_file():
                result = run_language_tasks(engine(), configs, self._options.limit, SHOTS.get(kind))
                folder.mkdir(parents=True, exist_ok=True)
                write_json(file, result)
            column.language[kind] = json.loads(file.read_text(encoding="utf-8"))

    @contextlib.contextmanager
    def _lazy_engine(self, model: str) -> Iterator[Engine]:
        """A function for the engine of a model, which is started when it is first asked for."""
        started: list[Any] = []

        def engine() -> Any:
            if not started:
                self._fetch()
                self._report(f"{folder_name(model)}: starting vLLM")
                from vllm import LLM

                with environment(serve_environment(engine_workers(self._options.engine))):
                    started.append(LLM(model, **self._options.engine_options()))
            return started[0]

        try:
            yield engine
        finally:
            for llm in started:
                llm.llm_engine.engine_core.shutdown()

    def _fetch(self) -> None:
        """Download what is not here yet, once: a missing network is known before long work.

        The data are let go of again, and loaded from the disk when their task's turn comes.
        """
        if self._fetched:
            return
        name = ""
        try:
            for task in self._tasks:
                name = f"--task {task.metadata.name}"
                parts = task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]
                for part in parts:
                    if not part.data_loaded:
                        part.load_data()
                        part.unload_data()
            for kind, configs in self._language.items():
                name = f"--{kind} hub"
                load_named(configs)
        except (OSError, httpx.HTTPError) as error:
            raise GemError(
                f"the data of {name} cannot be loaded: {error}; they are downloaded: check the "
                "network"
            ) from error
        self._fetched = True


def _kept_result(cache: ResultCache, task: AbsTask, meta: ModelMeta) -> Any:
    """mteb's result of a task, or None; a file that a run has left half written is removed."""
    try:
        return cache.load_task_result(task.metadata.name, meta)
    except ValueError:  # of JSON, and of pydantic
        cache.get_task_result_path(task.metadata.name, meta).unlink()
        return None
