"""What a batch job is asked to do, checked before anything is started."""

from __future__ import annotations

import json
import math
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError, first_line
from gem_vllm.folders import read_json
from gem_vllm.machine import engine_workers
from gem_vllm.serving.vectors import DTYPES, EMBEDDING, SCALE

ON_ERROR = ("fail", "skip", "null")
ID, GENERATED = "id", "generated"
# Memory and batches of the engine: what a job that had too little is gone on with.
FREE_ENGINE_OPTIONS = (
    "cpu_offload_gb",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
)


@dataclass(frozen=True)
class EmbedOptions:
    """A batch job: what to embed with which checkpoint, and how to write it.

    Local paths become absolute: the job's processes have working directories of their own.

    Attributes:
        model: folder of a GEM checkpoint, the same on every node.
        input: a file, folder or glob, local or an fsspec URI.
        output: folder, local or an fsspec URI.
        text_column: column to embed.
        id_column: column that becomes `id`; None for "file:row".
        keep: further columns to copy.
        dtype: of the vectors, one of `vectors.DTYPES`.
        dimensions: leading numbers of an embedding to keep; None for all.
        on_error: what a bad row does, one of `ON_ERROR`.
        generate: a prompt with columns in braces, answered for every row; None for embeddings only.
        max_tokens: of an answer.
        rows_per_shard: rows of an output file; None chooses by the size of the input.
    """

    model: Path
    input: str
    output: str
    text_column: str = "text"
    id_column: str | None = None
    keep: tuple[str, ...] = ()
    dtype: str = "float32"
    dimensions: int | None = None
    on_error: str = "fail"
    generate: str | None = None
    max_tokens: int = 128
    rows_per_shard: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Path(self.model).absolute())
        object.__setattr__(self, "input", _absolute(self.input))
        object.__setattr__(self, "output", _absolute(self.output))

    def check(self) -> None:
        """Raise GemError, in one line, for what cannot work."""
        size = embedding_size(self.model)
        for name, value, allowed in (
            ("--dtype", self.dtype, DTYPES),
            ("--on-error", self.on_error, ON_ERROR),
        ):
            if value not in allowed:
                raise GemError(f"{name} is {value!r}; it must be one of: {', '.join(allowed)}")
        if self.dimensions is not None and not 1 <= self.dimensions <= size:
            raise GemError(f"--dimensions is {self.dimensions}; embeddings here have 1 to {size}")
        if self.rows_per_shard is not None and self.rows_per_shard < 1:
            raise GemError(f"--rows-per-shard is {self.rows_per_shard}; give 1 or more")
        if self.max_tokens < 1:
            raise GemError(f"--max-tokens is {self.max_tokens}; give 1 or more")
        own = {ID, EMBEDDING, SCALE, GENERATED}
        for name in self.keep:
            if name in own or self.keep.count(name) > 1:
                raise GemError(
                    f"--keep {name}: the output has this column already; leave it out, or rename "
                    "it in the input"
                )
        self.prompt_columns()

    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that `generate` names."""
        if self.generate is None:
            return ()
        try:
            names = [name for _, name, _, _ in string.Formatter().parse(self.generate) if name]
            self.generate.format(**dict.fromkeys(names, _AnyValue()))
        except (ValueError, LookupError, AttributeError) as error:
            raise GemError(
                f"--generate {self.generate!r}: {first_line(error)}; name a column in its "
                "braces, and write a brace of the text twice"
            ) from error
        if not names:
            raise GemError(
                f"--generate {self.generate!r} names no column; write one in braces: {{text}}"
            )
        return tuple(dict.fromkeys(names))

    def columns(self) -> list[str]:
        """The input's columns that are read, the text first."""
        named = [self.text_column, self.id_column, *self.keep, *self.prompt_columns()]
        return list(dict.fromkeys(name for name in named if name is not None))

    def decisive(self) -> dict[str, Any]:
        """The options that decide what is written: a job is continued under the same ones."""
        names = ("text_column", "id_column", "dtype", "dimensions", "on_error", "generate")
        options = {name: getattr(self, name) for name in names}
        if self.generate is not None:
            options["max_tokens"] = self.max_tokens
        return {**options, "keep": list(self.keep)}

    def vector_size(self) -> int:
        """Numbers in an embedding that is written."""
        return self.dimensions or embedding_size(self.model)


@dataclass(frozen=True)
class ReplicaOptions:
    """The engines that do the work.

    Attributes:
        min_replicas: kept running.
        max_replicas: started where there is room and work.
        cpus: cores of a replica; None for all that there are, shared by `max_replicas`, and no
            more than the largest node has, or, of one with GPUs, for 1.
        tensor_parallel: GPUs, or CPU worker processes, that share a replica's model.
        engine: further options of vLLM's engine (`EngineArgs`).
        ray_address: of a running cluster; None for one on this machine, for this job.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    cpus: float | None = None
    tensor_parallel: int = 1
    engine: Mapping[str, Any] = field(default_factory=dict)
    ray_address: str | None = None

    def check(self) -> None:
        """Raise GemError, in one line, for what cannot work."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise GemError(
                f"--min-replicas {self.min_replicas} --max-replicas {self.max_replicas}: give 1 or "
                "more, and no more than the second"
            )
        if self.cpus is not None and not 1 <= self.cpus < math.inf:
            raise GemError(f"--cpus-per-replica is {self.cpus:g}; give 1 or more")
        if self.tensor_parallel < 1:
            raise GemError(f"--tensor-parallel-size is {self.tensor_parallel}; give 1 or more")
        if "model" in self.engine:
            raise GemError("--engine names a model; give it as --model (embed) or MODEL (serve)")
        for name, option in _OWN_OPTIONS.items():
            if name in self.engine:
                raise GemError(f"--engine has '{name}'; use {option}")
        stages = self.engine.get("pipeline_parallel_size", 1)
        if type(stages) is not int or stages < 1:
            raise GemError(f"--engine has pipeline_parallel_size {stages!r}; give 1 or more")

    def workers(self) -> int:
        """Processes that compute, of one replica."""
        return engine_workers({**self.engine, "tensor_parallel_size": self.tensor_parallel})

    def decisive(self) -> dict[str, Any]:
        """As `EmbedOptions.decisive`: the engine's options but `FREE_ENGINE_OPTIONS`, as JSON."""
        engine = {k: v for k, v in self.engine.items() if k not in FREE_ENGINE_OPTIONS}
        return {f"engine {k}": v for k, v in json.loads(json.dumps(engine, default=str)).items()}


# vLLM's name of what has an option of its own here.
_OWN_OPTIONS = {
    "tensor_parallel_size": "--tensor-parallel-size",
    "data_parallel_size": "--max-replicas",
}


class _AnyValue:
    """Has every format, as values of unknown types may have; nothing else."""

    def __format__(self, spec: str) -> str:
        return spec


def _absolute(path: str) -> str:
    return path if "://" in path or "::" in path else os.path.abspath(path)


def embedding_size(model: Path) -> int:
    """Numbers in an embedding of the checkpoint ``model``; GemError if it is none."""
    gem_config = GemConfig.from_pretrained(model)
    return gem_config.embedding_size(int(read_json(model / "config.json")["hidden_size"]))
