"""The safetensors files of a model folder, as files: which, their hash, a copy with more rows."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gem_vllm.errors import GemConfigError
from gem_vllm.folders import read_json, write_json

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, as `safetensors.safe_open`; GemConfigError if it cannot be read."""
    try:
        with safe_open(file, "pt") as opened:
            yield opened
    except (OSError, SafetensorError) as error:
        raise GemConfigError(
            f"{file} cannot be read ({error}); copy or download the folder again"
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with open_weights(file) as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the safetensors file that holds it, sorted by name.

    Raises:
        GemConfigError: there are none, one of several is missing, or there is no input embedding
            of the usual name.
    """
    if (folder / _SINGLE).is_file():
        with open_weights(folder / _SINGLE) as file:
            found = dict.fromkeys(file.keys(), folder / _SINGLE)
    elif (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX)["weight_map"]
        found = {name: folder / shard for name, shard in weight_map.items()}
        for shard in sorted(set(found.values())):
            if not shard.is_file():
                raise GemConfigError(f"{shard} is missing; copy or download the folder again")
    else:
        raise GemConfigError(
            f"{folder} has no {_SINGLE} and no {_INDEX}; other weight formats are not read: "
            "convert the model with transformers' save_pretrained"
        )
    if EMBEDDING not in found:
        raise GemConfigError(
            f"{folder} has no tensor {EMBEDDING}; load the model with transformers and save it "
            "with save_pretrained, which gives its tensors their usual names"
        )
    return dict(sorted(found.items()))


def weights_size(folder: Path) -> int:
    """Bytes of the folder's weight files."""
    return sum(file.stat().st_size for file in set(weight_files(folder).values()))


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor, in the dtype of the file."""
    with open_weights(weight_files(folder)[name]) as file:
        return file.get_tensor(name)


def weights_sha256(folder: Path, vocab_rows: int) -> str:
    """A hash of all weights: names, dtypes, shapes and bytes, however they are spread over files.

    Of the embedding and the head, the first ``vocab_rows`` rows count, so that a base and a
    checkpoint that added special tokens to it have the same hash.
    """
    digest = hashlib.sha256()
    for name, file in weight_files(folder).items():
        with open_weights(file) as shard:
            tensor = shard.get_tensor(name)
        if name in (EMBEDDING, HEAD):
            tensor = tensor[:vocab_rows]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_with_rows(
    source: Path, out: Path, base_rows: int, special_ids: tuple[int, ...], rows: Tensor, tied: bool
) -> None:
    """Copy the weight files of ``source``, with ``rows`` as the embeddings of the special tokens.

    Every other tensor, and every one of the base's rows that is not a special token's, is copied
    bit for bit. Rows that neither the base nor a special token has are zero, and so are the
    special tokens' rows of a head that is not tied to the embedding: their logits are never used.

    Args:
        source: folder of the base, or of a GEM checkpoint made from it.
        out: existing folder.
        base_rows: rows of the base's embedding.
        special_ids: k row numbers.
        rows: [k, hidden], any float dtype; cast to the embedding's own.
        tied: the head, if the files have one, repeats the embedding.
    """
    files = weight_files(source)
    grown = max(base_rows, max(special_ids) + 1)
    total = 0
    for file in sorted(set(files.values())):
        if not {name for name in (EMBEDDING, HEAD) if files.get(name) == file}:
            shutil.copyfile(file, out / file.name)
            total += _tensor_bytes(file)
            continue
        tensors = read_tensors(file)
        for name in (EMBEDDING, HEAD):
            if name in tensors:
                old = tensors[name]
                new = old.new_zeros(grown, *old.shape[1:])
                new[:base_rows] = old[:base_rows]
                new[list(special_ids)] = 0 if name == HEAD and not tied else rows.to(old.dtype)
                tensors[name] = new
        with open_weights(file) as shard:
            metadata = shard.metadata()
        save_file(tensors, out / file.name, metadata=metadata)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if (source / _INDEX).is_file() and not (source / _SINGLE).is_file():
        weight_map = read_json(source / _INDEX)["weight_map"]
        write_json(out / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensor_bytes(file: Path) -> int:
    """Of a safetensors file: all that is behind its header, whose length the first 8 bytes say."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
