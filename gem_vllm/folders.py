"""Writing model folders whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gem_vllm.errors import GemConfigError, GemError
from gem_vllm.processes import terminated_like_interrupted

_HASH_BYTES = 1 << 22
# Those in a GEM checkpoint: its adapter, and of tokenizers with several chat templates the others.
CHECKPOINT_FOLDERS = ("gem_adapter", "additional_chat_templates")
_SPARE_BYTES = 32 << 20  # for the tokenizer and the configs
_NAME_BYTES = 200  # of 255 that file systems take: what is written beside it is named after it


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; GemConfigError if it is missing or is not a JSON object."""
    if not file.is_file():
        raise GemConfigError(f"{file} is missing; copy or download the folder again")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise GemConfigError(f"{file} is not JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise GemConfigError(f"{file} is not a JSON object; copy the folder again")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write ``value`` with the keys in its own order; what was there stays until it is whole."""
    write_whole(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_whole(file: Path, text: str) -> None:
    """Write a text; what was there stays until it is whole."""
    part = file.with_name(f"{file.name}.tmp")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def content_sha256(path: Path) -> str:
    """Of a folder: names and contents of all its files; of a file: its contents."""
    digest = hashlib.sha256()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    for each in files:
        digest.update(f"{each.relative_to(path)}\0{each.stat().st_size}\0".encode())
        with each.open("rb") as file:
            while block := file.read(_HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()


def check_writable(folder: Path, *, weight_bytes: int = 0) -> None:
    """Check, before long work, that `written_whole` can write ``folder``.

    Raises:
        GemError: ``folder`` is neither new nor empty nor a GEM checkpoint or adapter, nothing can
            be renamed to it, or its disk has less room than ``weight_bytes`` and a little more.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.ismount(folder):
        raise GemError(f"{folder} is mounted, so it cannot be replaced; name a folder inside it")
    existing = writable_parent(folder)
    if folder.exists() and not folder.is_dir():
        raise GemError(f"{folder} is a file; name a folder to write")
    if folder.exists() and (foreign := _foreign(folder)):
        raise GemError(f"{folder} holds something else ({foreign}); choose another folder")
    need, free = weight_bytes + _SPARE_BYTES, shutil.disk_usage(existing).free
    if free < need:
        raise GemError(
            f"{existing} has {free >> 20} MiB free and {need >> 20} MiB are needed; make room, "
            "or choose a folder on another disk"
        )


def folder_name(path: str | Path) -> str:
    """What a folder is called, the working folder too; a link by its own name."""
    return Path(os.path.abspath(path)).name


def writable_parent(path: Path) -> Path:
    """The nearest folder above ``path`` that is there; GemError where it cannot be written in."""
    path = path.absolute()
    existing = next(parent for parent in path.parents if os.path.exists(parent))
    new = path.relative_to(existing).parts
    if too_long := [part for part in new if len(os.fsencode(part)) > _NAME_BYTES]:
        raise GemError(f"the name {too_long[0][:40]}... is too long; choose a shorter one")
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise GemError(f"nothing can be written in {existing}; choose another folder")
    return existing


def _foreign(folder: Path) -> str | None:
    """The name of an entry that must not be lost when ``folder`` is replaced."""
    config = folder / "config.json"
    ours = (folder / "gem_config.json").is_file() or (
        config.is_file() and "gem_config" in read_json(config)
    )
    for entry in sorted(folder.iterdir()):
        if not ours or (entry.is_dir() and entry.name not in CHECKPOINT_FOLDERS):
            return entry.name
    return None


@contextmanager
def written_whole(folder: Path, *, weight_bytes: int = 0) -> Iterator[Path]:
    """Write ``folder`` through the scratch folder that this gives, renamed when all is on disk.

    A GEM checkpoint or adapter that is there already is replaced, and stays whole until then. Where
    ``folder`` is a link, what it points to is written.

    Args:
        folder: to be written; new, empty, or a GEM checkpoint or adapter.
        weight_bytes: about how much will be written.

    Raises:
        GemError: as `check_writable`, which comes first, or the disk is full in the end.
    """
    check_writable(folder, weight_bytes=weight_bytes)
    folder = Path(os.path.realpath(folder))
    try:
        with _renamed_when_done(folder) as new:
            yield new
    except Exception as error:
        if is_no_room(error):
            raise GemError(
                f"{folder.parent} has no room left for {folder.name}; make room, or choose a "
                "folder on another disk"
            ) from error
        raise


@contextmanager
def _renamed_when_done(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        terminated_like_interrupted(),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch,
    ):
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        new.mkdir()
        yield new
        readable = new.stat().st_mode & 0o666  # safetensors makes files for the owner only
        for path in [*new.rglob("*"), new]:
            if path.is_file():
                path.chmod(readable)
            fsync(path)
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        except BaseException:
            if old.exists() and not folder.exists():
                old.rename(folder)
            raise
        fsync(folder.parent)


def fsync(path: str | Path) -> None:
    """Have what is written of a file, or of a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_no_room(error: BaseException) -> bool:
    """Whether a file could not be written for want of space, or of a quota; also a cause of it.

    safetensors puts the number of the system's error into its text.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in numbers
    if error.__cause__ is not None and is_no_room(error.__cause__):
        return True
    return isinstance(error, SafetensorError) and any(
        re.search(rf"\b(os error|code:) {number}\b", str(error)) for number in numbers
    )


def refuse_existing(folder: Path, *, overwrite: bool) -> None:
    """GemError where ``folder`` holds something, unless that is to be replaced."""
    if not overwrite and os.path.isdir(folder) and os.listdir(folder):
        raise GemError(
            f"{folder} is not empty; replace it with --overwrite, or choose another --out"
        )


def refuse_inside(out: Path, *sources: Path) -> None:
    """GemError where ``out`` is one of the folders that are read for it, or is in one."""
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise GemError(f"--out {out} is in {source}, which is read; choose a folder beside it")
