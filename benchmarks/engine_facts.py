"""What `engine.py` needs to know of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}


def weight_bytes(folder: Path, dtype: str, only: str = "") -> int:
    """Bytes of a folder's safetensors weights in ``dtype``: "float32", or "auto" for their own.

    Args:
        folder: of a model or an adapter; 0 where it has no weights.
        dtype: as the engines get it.
        only: tensors whose names begin so.
    """
    return sum(
        math.prod(shape) * (4 if dtype == "float32" else DTYPE_BYTES[stored])
        for name, shape, stored in _tensors(folder)
        if name.startswith(only)
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Sequence[int], str]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                tensor = weights.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype()
