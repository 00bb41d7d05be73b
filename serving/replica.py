"""A replica of a batch job: one engine, which turns shards into files."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from gem_vllm.machine import is_cpu_build
from gem_vllm.serving.columnar import Chunk
from gem_vllm.serving.engine import Answer, EngineThread, in_order
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import BROKEN_FILE, InputFile, read_rows
from gem_vllm.serving.job_metrics import JobMetrics
from gem_vllm.serving.manifest import DONE, ERRORS, PLAN, OutputFolder
from gem_vllm.serving.options import GENERATED, ID, EmbedOptions
from gem_vllm.serving.output_rows import ERROR_SCHEMA, make_schema, problem_of, row_ids, strings
from gem_vllm.serving.plan import Shard
from gem_vllm.serving.vectors import vector_columns

CHUNKS_IN_FLIGHT = 3
# What is counted of a shard, for its marker and the job's summary.
COUNTS = ("rows", "embedded", "reported", "tokens")


@dataclass
class _Work:
    """A chunk whose good rows are with the engine."""

    chunk: Chunk
    good: list[int]
    embeddings: list[Any]
    answers: list[Any]


@dataclass
class _Counts:
    rows: int = 0
    embedded: int = 0
    reported: int = 0
    tokens: int = 0
    errors: list[tuple[str, int, str | None, str]] = field(default_factory=list)


class Replica:
    """What Ray Data makes one of in every actor of the pool.

    Args:
        options: of the job.
        engine: options of vLLM's engine.
        bound: what the job is bound to, for the files' metadata.
        types: the input's columns, by name.
        cpu_build: whether the driver's vLLM, by which replicas are placed, is the CPU build.
    """

    def __init__(
        self,
        options: EmbedOptions,
        engine: dict[str, Any],
        bound: dict[str, Any],
        types: dict[str, pa.DataType],
        cpu_build: bool,
    ) -> None:
        self._options, self._types = options, types
        self._engine_options = engine
        self._engine: EngineThread | None = None
        self._starting = threading.Lock()
        self._output = OutputFolder(options.output)
        self._bound, self._cpu_build = bound, cpu_build
        self._name = ray.get_runtime_context().get_actor_id()
        self._metrics = JobMetrics(options.output)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Write the shard that is the batch's one row.

        Args:
            batch: the shard's fields and "url", as `shard_rows` gives them.

        Returns:
            One row: "failure", empty or why the job cannot go on, the shard's counts, and the
            "replica"'s name.
        """
        row = {key: values[0] for key, values in batch.items()}
        shard = Shard(**{field.name: int(row[field.name]) for field in fields(Shard)})
        counts = dict.fromkeys(COUNTS, 0)
        failure = ""
        try:
            counts |= self._write(shard, InputFile(str(row["url"]), 0, ""))
        except JobError as error:
            # As a value: of an exception, what reaches the driver through Ray Data is a text.
            failure = str(error)
        result = {**counts, "failure": failure, "replica": self._name}
        return {key: [value] for key, value in result.items()}

    def _write(self, shard: Shard, file: InputFile) -> dict[str, int]:
        self._start_engine()
        counts = _Counts()
        with (
            self._output.writing(f"part-{shard.name}.parquet") as path,
            pq.ParquetWriter(path, self._schema, compression="zstd") as writer,
        ):
            for table in self._tables(shard, file, counts):
                writer.write_table(table)
        self._check_count(shard, file, counts)
        self._write_errors(shard, counts)
        done = {name: getattr(counts, name) for name in COUNTS}
        self._output.write_json(f"{DONE}/{shard.name}.json", done)
        return done

    def _start_engine(self) -> None:
        """With the first shard: why a constructor fails is not told to the driver."""
        o = self._options
        with self._starting:
            if self._engine is None:
                self._check_node()
                self._size = o.vector_size()
                self._schema = make_schema(o, self._types, self._size, self._bound)
                self._engine = EngineThread(
                    o.model, self._engine_options, o.dimensions, o.max_tokens
                )

    def _check_node(self) -> None:
        """JobError where this node has not what the driver's has."""
        node = f"node {ray.util.get_node_ip_address()}"
        if self._output.read_json(PLAN) is None:
            raise JobError(
                f"{node} does not see what is in {self._output.url}; give an --output that all "
                "nodes share"
            )
        if not (self._options.model / "config.json").is_file():
            raise JobError(f"{node} has no {self._options.model}; give a --model that all have")
        if is_cpu_build() != self._cpu_build:
            here, there = ("CPU", "CUDA") if is_cpu_build() else ("CUDA", "CPU")
            raise JobError(
                f"{node} has the {here} build of vLLM, and where the job was begun is the {there} "
                "build, by which replicas are placed; begin it where the build is the nodes'"
            )

    def _check_count(self, shard: Shard, file: InputFile, counts: _Counts) -> None:
        if counts.rows != shard.stop - shard.start:
            raise JobError(
                f"{file.url}: {shard.stop - shard.start} rows were counted from {shard.start} on, "
                f"and {counts.rows} found; the file has changed. Choose another --output"
            )

    def _write_errors(self, shard: Shard, counts: _Counts) -> None:
        name = f"{ERRORS}/{shard.name}.parquet"
        if not counts.errors:
            # An attempt that ended before its marker may have left some.
            self._output.remove(name)
            return
        columns = zip(*counts.errors, strict=True)
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(columns, ERROR_SCHEMA, strict=True)
        ]
        with self._output.writing(name) as path:
            pq.write_table(pa.Table.from_arrays(arrays, schema=ERROR_SCHEMA), path)

    def _tables(self, shard: Shard, file: InputFile, counts: _Counts) -> Iterator[pa.Table]:
        """The shard's rows, in order; while one chunk is waited for, others are with the engine."""
        chunks = read_rows(file, shard.rows, self._types, self._options.text_column)
        pending: deque[_Work] = deque()
        try:
            for chunk in chunks:
                pending.append(self._submit(chunk))
                if len(pending) == CHUNKS_IN_FLIGHT:
                    yield self._table(pending.popleft(), file, counts)
        except BROKEN_FILE as error:
            raise JobError(f"{file.url} cannot be read: {error}") from error
        while pending:
            yield self._table(pending.popleft(), file, counts)

    def _submit(self, chunk: Chunk) -> _Work:
        assert self._engine is not None
        texts: list[str] = []
        good: list[int] = []
        id_column = self._options.id_column
        needed = [name for name in (id_column, *self._options.prompt_columns()) if name is not None]
        for i, value in enumerate(chunk.columns[self._options.text_column].to_pylist()):
            problem = chunk.problems.get(i) or problem_of(value)
            for name in needed:
                if problem is None and not chunk.columns[name][i].is_valid:
                    problem = f"column '{name}' is null"
            if problem is None:
                good.append(i)
                texts.append(value.decode("utf-8"))
            else:
                chunk.problems[i] = problem
        embeddings = self._engine.embed(texts)
        answers = []
        if self._options.generate is not None:
            answers = self._engine.generate(
                self._prompts(self._options.generate, chunk, good, texts)
            )
        return _Work(chunk, good, embeddings, answers)

    def _prompts(self, template: str, chunk: Chunk, good: list[int], texts: list[str]) -> list[str]:
        names = self._options.prompt_columns()
        columns = {name: chunk.columns[name].to_pylist() for name in names}
        if self._options.text_column in columns:
            of_row = dict(zip(good, texts, strict=True))
            columns[self._options.text_column] = [of_row.get(i) for i in range(len(chunk))]
        return [template.format(**{name: columns[name][i] for name in names}) for i in good]

    def _table(self, work: _Work, file: InputFile, counts: _Counts) -> pa.Table:
        """The rows of a chunk as they are written, once the engine has answered."""
        chunk, options = work.chunk, self._options

        def bad(n: int, reason: str) -> None:
            chunk.problems.setdefault(work.good[n], reason)

        embedded = _spread(in_order(work.embeddings, bad), work.good, len(chunk))
        answered = _spread(in_order(work.answers, bad), work.good, len(chunk))
        good = [i not in chunk.problems for i in range(len(chunk))]
        vectors = [a.vector if a and good[i] else None for i, a in enumerate(embedded)]
        texts = [a.text if a and good[i] else None for i, a in enumerate(answered)]
        ids = row_ids(chunk, file, options)
        self._report(chunk, ids, file, counts)
        tokens = sum(answer.tokens for answer in (*embedded, *answered) if answer)
        counts.rows += len(chunk)
        counts.embedded += sum(good)
        counts.tokens += tokens
        self._metrics.add(rows=len(chunk), embedded=sum(good), tokens=tokens)
        columns = {
            ID: ids,
            **{name: chunk.columns[name] for name in options.keep},
            **vector_columns(vectors, options.dtype, self._size),
        }
        if options.text_column in options.keep:
            columns[options.text_column] = strings(chunk, options.text_column)
        if options.generate is not None:
            columns[GENERATED] = pa.array(texts, pa.string())
        arrays = [columns[name] for name in self._schema.names]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        return table.filter(pa.array(good)) if options.on_error == "skip" else table

    def _report(self, chunk: Chunk, ids: pa.Array, file: InputFile, counts: _Counts) -> None:
        """Note the chunk's bad rows, or end the job with the first."""
        for i, problem in sorted(chunk.problems.items()):
            row, id_ = chunk.start + i, ids[i].as_py()
            if self._options.on_error == "fail":
                raise JobError(
                    f"{file.url} row {row}: {problem}. Go on with --on-error skip or null; or "
                    "mend the row, and begin anew with another --output"
                )
            counts.errors.append((file.url, row, None if id_ is None else str(id_), problem))
        counts.reported += len(chunk.problems)


def _spread(answers: list[Answer | None], rows: list[int], count: int) -> list[Answer | None]:
    """``answers`` at their rows out of ``count``; None elsewhere, and for no answers at all."""
    spread: list[Answer | None] = [None] * count
    for i, answer in zip(rows, answers or [None] * len(rows), strict=True):
        spread[i] = answer
    return spread


def shard_rows(shards: list[Shard], files: list[InputFile]) -> list[dict[str, Any]]:
    """The shards as rows that `Replica` takes."""
    return [{**asdict(shard), "url": files[shard.file].url} for shard in shards]
