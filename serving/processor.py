"""Embedding as one step of a Ray Data pipeline, in the manner of `ray.data.llm`.

    processor = build_embed_processor(EmbedProcessorConfig(model="my-model"))
    embedded = processor(ray.data.read_parquet("s3://bucket/texts"))

`gem-vllm embed` is the job around it that can be gone on with; a pipeline of one's own reads,
writes and retries as Ray Data does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray

from gem_vllm.errors import GemError
from gem_vllm.serving.engine import BadRow, EngineThread, in_order
from gem_vllm.serving.options import ReplicaOptions, embedding_size
from gem_vllm.serving.pool import map_in_pool


@dataclass(frozen=True)
class EmbedProcessorConfig:
    """What to embed, with which checkpoint.

    Attributes:
        model: folder of a GEM checkpoint, the same on every node.
        text_column: column to embed; a row whose text cannot be embedded fails the pipeline.
        output_column: float32 [d] for every row.
        dimensions: leading numbers of an embedding to keep; None for all.
        batch_size: rows of a call; the engine's own batches are formed by tokens.
        replicas: engines, and what each gets.

    Raises:
        GemError: what cannot work, in one line.
    """

    model: str | Path
    text_column: str = "text"
    output_column: str = "embedding"
    dimensions: int | None = None
    batch_size: int = 1024
    replicas: ReplicaOptions = field(default_factory=ReplicaOptions)

    def __post_init__(self) -> None:
        # An actor has a working directory of its own.
        object.__setattr__(self, "model", Path(self.model).absolute())
        self.replicas.check()
        size = embedding_size(Path(self.model))
        if self.dimensions is not None and not 1 <= self.dimensions <= size:
            raise GemError(f"dimensions is {self.dimensions}; embeddings here have 1 to {size}")
        if self.batch_size < 1:
            raise GemError(f"batch_size is {self.batch_size}; give 1 or more")


def build_embed_processor(
    config: EmbedProcessorConfig,
) -> Callable[[ray.data.Dataset], ray.data.Dataset]:
    """A function that adds the embeddings to a data set, lazily, as `map_batches` does."""

    def process(rows: ray.data.Dataset) -> ray.data.Dataset:
        return map_in_pool(
            rows,
            RowEmbedder,
            config.replicas,
            most_actors=None,
            batch_size=config.batch_size,
            arguments={"config": config},
        )

    return process


class RowEmbedder:
    """What Ray Data makes one of in every actor of the pool.

    Args:
        config: of the processor.
        engine: options of vLLM's engine.
    """

    def __init__(self, config: EmbedProcessorConfig, engine: dict[str, Any]) -> None:
        self._config, self._options = config, engine
        self._engine: EngineThread | None = None
        self._starting = threading.Lock()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch with the embeddings of its texts."""
        config = self._config
        with self._starting:
            if self._engine is None:
                self._engine = EngineThread(
                    Path(config.model), self._options, config.dimensions, max_tokens=1
                )
        texts = batch[config.text_column].tolist()
        for text in texts:
            if not isinstance(text, str) or not text:
                raise BadRow(f"column '{config.text_column}' has {text!r}, which is no text")

        def bad(i: int, reason: str) -> None:
            raise BadRow(f"{texts[i]!r:.80}: {reason}")

        answers = in_order(self._engine.embed(texts), bad)
        vectors: list[Any] = [answer.vector for answer in answers if answer is not None]
        return {**batch, config.output_column: np.stack(vectors)}
