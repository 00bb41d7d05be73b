"""Reading text: forms, streams, and what is said about files that cannot be read."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from gem_vllm.errors import GemError
from gem_vllm.training.data import TextSource, read_jsonl, shuffled

LINES = ["one text", "another, with an accent: é", "a third"]


def write(path: Path, content: str) -> str:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def as_jsonl(lines: list[str], field: str = "text") -> str:
    return "".join(json.dumps({field: line, "other": 1}) + "\n" for line in lines)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz"])
def test_every_form_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    content = as_jsonl(LINES) if "jsonl" in name else "\n".join([LINES[0], "", *LINES[1:]])
    source = TextSource(write(tmp_path / name, content))
    source.check()
    assert list(source) == LINES
    assert list(source) == LINES, "a source can be read again"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path, name: str) -> None:
    content = as_jsonl(LINES) if "jsonl" in name else "\n".join(LINES)
    assert list(TextSource(write(tmp_path / name, f"\ufeff{content}"))) == LINES


def test_what_utf_8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    row = {"text": "an old \ud83d bridge", "of": ["\ud83d\ude00", {"\ude00": "\ude00"}]}
    path = Path(write(tmp_path / "a.jsonl", json.dumps(row) + "\n"))
    assert [value for _, value in read_jsonl(path)] == [
        {"text": "an old ? bridge", "of": ["\U0001f600", {"?": "?"}]}
    ]


def test_the_last_suffix_tells_the_form(tmp_path: Path) -> None:
    assert list(TextSource(write(tmp_path / "a.jsonl.txt", as_jsonl(LINES[:1])))) == [
        as_jsonl(LINES[:1]).strip()
    ]


def test_field_is_named(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", as_jsonl(LINES, "body"))
    assert list(TextSource(spec, "body")) == LINES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", as_jsonl(LINES[:1], "body"), r"line 1: no field 'text'; .*--text-field .*body"),
        ("a.jsonl", as_jsonl(LINES[:1]) + "{oops\n", "line 2: not a JSON object"),
        ("a.jsonl", "[1]\n", "line 1: expected a JSON object"),
        ("a.jsonl", '{"text": 3}\n', "line 1: field 'text' is not text"),
        ("a.jsonl", f'{{"text": {"9" * 5000}}}\n', "line 1: not a JSON object: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not a JSON object: maximum recursion depth"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(GemError, match=message):
        list(TextSource(write(tmp_path / name, content)))


def make_missing(folder: Path) -> str:
    return str(folder / "missing.txt")


def make_too_long(folder: Path) -> str:
    return f"{'a' * 300}.txt"


def make_empty(folder: Path) -> str:
    return write(folder / "a.txt", "\n\n")


def make_parquet(folder: Path) -> str:
    return write(folder / "a.parquet", "x")


def make_truncated(folder: Path) -> str:
    path = folder / "a.txt.gz"
    path.write_bytes(gzip.compress(random.Random(0).randbytes(99).hex().encode())[:50])
    return str(path)


def make_latin(folder: Path) -> str:
    path = folder / "a.txt"
    path.write_bytes(b"caf\xe9\n")
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_missing, "does not exist"),
        (make_too_long, "does not exist"),
        (str, "is a folder"),
        (make_empty, "holds no text"),
        (make_parquet, "cannot read this"),
        (make_truncated, "cannot be read"),
        (make_latin, "not UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, make: Callable[[Path], str], message: str) -> None:
    with pytest.raises(GemError, match=message):
        TextSource(make(tmp_path)).check()


def test_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, **options: Any) -> IterableDataset:
        asked.append((name, options))
        return IterableDataset.from_generator(lambda: ({"text": line} for line in LINES))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(TextSource("some/dataset")) == LINES
    assert list(TextSource("some/dataset:validation")) == LINES
    assert asked == [
        ("some/dataset", {"split": "train", "streaming": True}),
        ("some/dataset", {"split": "validation", "streaming": True}),
    ]


def test_dataset_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, **_: Any) -> None:
        raise FileNotFoundError(f"Couldn't find {name}")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(GemError, match=r"no file, and no dataset that loads .* find some/dataset"):
        TextSource("some/dataset").check()


def test_dataset_that_breaks_off_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows():
        yield {"text": "a text"}
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    with pytest.raises(GemError, match="some/dataset, row 1 cannot be read: no network"):
        list(TextSource("some/dataset"))


def test_shuffle_holds_no_more_than_its_buffer() -> None:
    read = 0

    def texts():
        nonlocal read
        for read in range(1000):
            yield str(read)

    stream = shuffled(texts(), random.Random(0), buffer_size=10)
    first = [next(stream) for _ in range(5)]
    assert read <= 15
    assert sorted([*first, *stream], key=int) == [str(i) for i in range(1000)]
