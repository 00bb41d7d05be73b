"""Training text, streamed: one text at a time, from files or from a Hugging Face dataset."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from gem_vllm.errors import GemError, first_line

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
SHUFFLE_BUFFER = 8192

T = TypeVar("T")


@dataclass(frozen=True)
class TextSource:
    """Texts of one ``--data``: a file of lines or JSON lines, or a Hugging Face dataset's name.

    Iterating reads from the start, one text at a time, blank texts left out. Raises GemError, with
    file and line, for what cannot be read.
    """

    spec: str
    field: str = "text"

    def __iter__(self) -> Iterator[str]:
        if os.path.isfile(self.spec):
            return _read_file(Path(self.spec), self.field)
        return self._read_dataset()

    def check(self) -> None:
        """Raise GemError unless the source can be read and holds at least one text."""
        spec = self.spec
        is_file = os.path.isfile(spec)  # of a name that is too long, False
        looks_like_file = spec.endswith(SUFFIXES) or os.path.isabs(spec) or os.path.exists(spec)
        if looks_like_file and not is_file:
            problem = "is a folder, not a file" if os.path.isdir(spec) else "does not exist"
            raise GemError(f"--data {spec} {problem}; give a {', '.join(SUFFIXES)} file")
        if is_file and not spec.endswith(SUFFIXES):
            raise GemError(f"--data {spec}: cannot read this; give a {', '.join(SUFFIXES)}")
        if next(iter(self), None) is None:
            raise GemError(f"--data {spec} holds no text")

    def _read_dataset(self) -> Iterator[str]:
        from datasets import load_dataset

        name, _, split = self.spec.partition(":")
        try:
            rows = iter(load_dataset(name, split=split or "train", streaming=True))
        except Exception as error:
            raise GemError(
                f"--data {self.spec} is no file, and no dataset that loads (NAME or NAME:SPLIT): "
                f"{first_line(error)}"
            ) from error
        for number in itertools.count():
            where = f"{self.spec}, row {number}"
            try:
                row = next(rows, None)
            except Exception as error:
                raise GemError(f"--data {where} cannot be read: {first_line(error)}") from error
            if row is None:
                return
            if text := _text_of(row, self.field, where):
                yield text


def _read_file(path: Path, field: str) -> Iterator[str]:
    if is_jsonl(path):
        texts = (_text_of(row, field, where) for where, row in read_jsonl(path))
    else:
        texts = (line for _, line in _read_lines(path))
    return filter(None, texts)


def is_jsonl(path: Path) -> bool:
    """Whether a file is one of JSON lines, by its name."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """The values in a file of JSON lines, also .gz, each with where it is, for messages.

    Raises GemError, with the line, for what cannot be read.
    """
    for number, line in _read_lines(path):
        where = f"{path}, line {number}"
        try:
            value = _encodable(json.loads(line))
        except (ValueError, RecursionError) as error:  # too long an integer, too deep a nesting
            raise GemError(f"{where}: not a JSON object: {error}") from error
        yield where, value


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number, and a float holds it: no boolean, NaN or infinity."""
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return is_one and abs(value) <= sys.float_info.max


def _encodable(value: Any) -> Any:
    """A value of JSON with ``?`` for each lone surrogate, which no tokenizer takes."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_encodable(each) for each in value]
    if isinstance(value, dict):
        return {_encodable(name): _encodable(each) for name, each in value.items()}
    return value


def open_text(path: Path, mode: Literal["r", "w"] = "r") -> IO[str]:
    """A file of UTF-8 text, also .gz; a mark of the byte order at its start is passed over."""
    opener: Callable[..., Any] = gzip.open if path.name.endswith(".gz") else open
    return opener(path, f"{mode}t", encoding="utf-8-sig" if mode == "r" else "utf-8")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, stripped, with their numbers from 1."""
    number = 0
    try:
        with open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line := line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise GemError(f"{path}, after line {number}: not UTF-8 text; convert it first") from error
    except (EOFError, OSError, zlib.error) as error:
        reason = first_line(error)
        raise GemError(f"{path}, after line {number}: cannot be read: {reason}") from error


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise GemError(f"{where}: expected a JSON object with a field {field!r}")
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise GemError(f"{where}: no field {field!r}; choose one by --text-field (here: {fields})")
    if not isinstance(row[field], str):
        raise GemError(f"{where}: field {field!r} is not text")
    return row[field].strip()


def shuffled(
    texts: Iterable[T], rng: random.Random, *, buffer_size: int = SHUFFLE_BUFFER
) -> Iterator[T]:
    """Yield ``texts`` in a random order, holding at most ``buffer_size`` of them in memory."""
    buffer: list[T] = []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        at = rng.randrange(buffer_size)
        out, buffer[at] = buffer[at], text
        yield out
    rng.shuffle(buffer)
    yield from buffer
