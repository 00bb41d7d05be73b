"""Hard negatives: texts that a model takes for near neighbours of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gem_vllm.errors import GemError, first_line
from gem_vllm.serving.vectors import EMBEDDING
from gem_vllm.training.choices import MAX_SEED
from gem_vllm.training.pairs import check_pairs_file, write_pairs

# Similarities: with their order, 1 GB.
PAIRS_AT_ONCE = 1 << 26


@dataclass(frozen=True, kw_only=True)
class MineOptions:
    """Which neighbours become negatives.

    Attributes:
        vectors: folder of Parquet files, as ``gem-vllm embed --keep TEXT_COLUMN`` writes them, with
            float32 or float16 vectors; all of them are held in memory, as float32.
        out: file to write, .jsonl or .jsonl.gz, for ``gem-vllm train --pairs``.
        text_column: of the texts.
        negatives: for each text.
        range_min: so many of the nearest neighbours are passed over: they may say the same.
        range_max: negatives are drawn from the neighbours up to this one.
        seed: of the draw.
    """

    vectors: Path
    out: Path
    text_column: str = "text"
    negatives: int = 4
    range_min: int = 10
    range_max: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.negatives < 1 or self.range_min < 0:
            raise GemError("--negatives must be at least 1, and --range-min at least 0")
        if self.range_max < self.range_min + self.negatives:
            raise GemError("--range-max must be at least --range-min and --negatives together")
        if not 0 <= self.seed <= MAX_SEED:
            raise GemError(f"--seed must be from 0 to {MAX_SEED}")
        check_pairs_file(self.out)


def mine(options: MineOptions, progress: Callable[[int, int], None]) -> int:
    """Write a line for each text, ``{"anchor": text, "negative": [texts]}``, whole or not at all.

    There is no positive in it: training makes one of the anchor. Texts that occur several times
    count once, and blank ones not at all.

    Args:
        options: checked already.
        progress: called with how many texts are done, and of how many.

    Returns:
        The number of lines.

    Raises:
        GemError: the vectors cannot be read, or are too few for ``range_max``.
    """
    texts, vectors = _read(options)
    if len(texts) <= options.range_max:
        raise GemError(
            f"{options.vectors} holds {len(texts)} different texts; --range-max "
            f"{options.range_max} needs more"
        )
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    random = np.random.default_rng(options.seed)
    at_once = max(1, PAIRS_AT_ONCE // len(texts))

    def rows() -> Iterator[dict[str, Any]]:
        for start in range(0, len(texts), at_once):
            end = min(start + at_once, len(texts))
            for row, near in enumerate(_neighbours(vectors, start, end, options), start):
                chosen = sorted(random.choice(len(near), options.negatives, replace=False))
                yield {"anchor": texts[row], "negative": [texts[other] for other in near[chosen]]}
            progress(end, len(texts))

    write_pairs(options.out, rows())
    return len(texts)


def _neighbours(vectors: np.ndarray, start: int, end: int, options: MineOptions) -> np.ndarray:
    """For rows ``start`` to ``end``, those at ranks range_min to range_max, nearest first."""
    rows = np.arange(start, end)
    similarity = vectors[rows] @ vectors.T
    similarity[np.arange(len(rows)), rows] = -np.inf  # itself
    near = np.argpartition(-similarity, options.range_max - 1, axis=1)[:, : options.range_max]
    order = np.argsort(-np.take_along_axis(similarity, near, axis=1), axis=1, kind="stable")
    return np.take_along_axis(near, order, axis=1)[:, options.range_min :]


def _read(options: MineOptions) -> tuple[list[str], np.ndarray]:
    """The different texts that are not blank, and float32 [n, d] of their vectors.

    Rows without either are left out.
    """
    files = sorted(options.vectors.glob("*.parquet"))
    if not files:
        raise GemError(f"{options.vectors} holds no Parquet files; make them with: gem-vllm embed")
    texts: dict[str, None] = {}
    parts: list[np.ndarray] = []
    for file in files:
        table = _read_columns(file, options.text_column)
        size = table.column(1).type.list_size
        if parts and size != parts[0].shape[1]:
            raise GemError(
                f"{file} holds vectors of {size} numbers, and others {parts[0].shape[1]}; mine in "
                "those of one job"
            )
        kept = []
        for number, text in enumerate(table.column(0).to_pylist()):
            if text.strip() and text not in texts:
                texts[text] = None
                kept.append(number)
        flat = table.column(1).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        parts.append(flat.reshape(-1, size).astype(np.float32)[kept])
    return list(texts), np.concatenate(parts)


def _read_columns(file: Path, text_column: str) -> pa.Table:
    """The rows with both a text, in column 0, and a vector, in column 1."""
    try:
        _check_columns(file, pq.read_schema(file), text_column)
        return pq.read_table(file, columns=[text_column, EMBEDDING]).drop_null()
    except (OSError, pa.ArrowException) as error:
        raise GemError(f"{file} cannot be read: {first_line(error)}") from error


def _check_columns(file: Path, schema: pa.Schema, text_column: str) -> None:
    names = set(schema.names)
    if EMBEDDING not in names or not _is_vector(schema.field(EMBEDDING).type):
        raise GemError(f"{file} holds no float32 or float16 vectors; embed with --dtype float32")
    if text_column not in names:
        raise GemError(
            f"{file} has no column {text_column!r}; embed with --keep {text_column}, "
            "or name another one by --text-column"
        )
    kind = schema.field(text_column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise GemError(
            f"{file}: column {text_column!r} holds no texts but {kind}; name another one by "
            "--text-column"
        )


def _is_vector(kind: pa.DataType) -> bool:
    floats = (pa.float32(), pa.float16())
    return pa.types.is_fixed_size_list(kind) and kind.value_type in floats
