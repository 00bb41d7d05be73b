"""Every row of every format has its number, whatever is wrong with it."""

from __future__ import annotations

import gzip
import json
import shutil
from argparse import Namespace
from itertools import accumulate
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from fsspec.spec import AbstractBufferedFile

from gem_vllm.errors import GemError
from gem_vllm.serving.columnar import CHUNK_ROWS, Chunk, RowRange
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import BROKEN_FILE, column_types, count_rows, list_files, read_rows
from gem_vllm.serving.job import _check_unchanged
from gem_vllm.serving.lines import SAMPLED_ROWS
from gem_vllm.serving.plan import Plan


def read_all(path: Path, names: list[str], start: int = 0, stop: int | None = None) -> list[Chunk]:
    (file,) = list_files(str(path))
    types = column_types([file], names)
    stop = count_rows(file).rows if stop is None else stop
    return list(read_rows(file, RowRange(start, stop), types, names[0]))


def texts(chunks: list[Chunk], name: str = "text") -> list[Any]:
    return [value for chunk in chunks for value in chunk.columns[name].to_pylist()]


@pytest.fixture(params=["parquet", "arrow", "jsonl", "jsonl.gz", "csv", "csv.gz", "txt", "txt.gz"])
def numbered(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """1,300 rows, "text 0" and so on, in each format."""
    path = tmp_path / f"rows.{request.param}"
    rows = [f"text {i}" for i in range(1300)]
    kind = request.param.removesuffix(".gz")
    if kind == "parquet":
        pq.write_table(pa.table({"text": rows, "n": range(1300)}), path, row_group_size=400)
        return path
    if kind == "arrow":
        table = pa.table({"text": rows, "n": range(1300)})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=700)
        return path
    lines = {
        "jsonl": [json.dumps({"text": row, "n": i}) for i, row in enumerate(rows)],
        "csv": ["text,n", *(f'"{row}",{i}' for i, row in enumerate(rows))],
        "txt": rows,
    }[kind]
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(("start", "stop"), [(0, 1300), (0, 1), (399, 401), (700, 1299)])
def test_any_range_of_rows(numbered: Path, start: int, stop: int) -> None:
    chunks = read_all(numbered, ["text"], start, stop)
    assert texts(chunks) == [f"text {i}".encode() for i in range(start, stop)]
    assert chunks[0].start == start
    behind = accumulate((len(chunk) for chunk in chunks), initial=start)
    assert [*(chunk.start for chunk in chunks), stop] == list(behind)
    assert all(len(chunk) <= CHUNK_ROWS and not chunk.problems for chunk in chunks)


@pytest.mark.parametrize("numbered", ["jsonl", "jsonl.gz"], indirect=True)
def test_rows_of_other_shards_are_not_parsed(
    numbered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = list_files(str(numbered))
    parsed = []
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or {})
    list(read_rows(file, RowRange(1200, 1250), {"text": pa.string()}, "text"))
    assert len(parsed) == 50


def test_other_columns_keep_their_types(numbered: Path) -> None:
    if ".txt" in numbered.name:
        with pytest.raises(GemError, match="no column 'n'; its columns are: text"):
            read_all(numbered, ["text", "n"])
        return
    values = texts(read_all(numbered, ["text", "n"], 10, 12), "n")
    assert values == (["10", "11"] if ".csv" in numbered.name else [10, 11])


def test_a_data_set_saved_by_datasets(tmp_path: Path) -> None:
    rows = [f"text {i}" for i in range(2500)]
    Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "saved", num_shards=3)
    # What `map` keeps there has the rows once more.
    for name in ("cache-0123.arrow", "rest.arrow"):
        shutil.copy(next((tmp_path / "saved").glob("data-*")), tmp_path / "saved" / name)
    files = list_files(str(tmp_path / "saved"))
    counts = [count_rows(file).rows for file in files]
    types = column_types(files, ["text"])
    read = [
        chunk
        for file, count in zip(files, counts, strict=True)
        for chunk in read_rows(file, RowRange(0, count), types, "text")
    ]
    assert (len(counts), texts(read)) == (3, [row.encode() for row in rows])


def test_an_arrow_stream_on_another_file_system(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["a", None, "c"]}).save_to_disk(tmp_path / "saved")
    memory = fsspec.filesystem("memory")
    memory.put(f"{tmp_path}/saved", f"/{tmp_path.name}", recursive=True)
    (file,) = list_files(f"memory://{tmp_path.name}")
    types = column_types([file], ["text"])
    assert texts(list(read_rows(file, RowRange(1, 3), types, "text"))) == [None, b"c"]


@pytest.mark.parametrize("content", ["no Arrow", "", "file"])
def test_a_file_that_is_no_arrow_stream_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "in.arrow"
    path.write_text(content)
    if content == "file":
        table = pa.table({"text": ["a"]})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(GemError, match=r"in.arrow cannot be read: it is not an Arrow stream"):
        column_types(list_files(str(path)), ["text"])


@pytest.mark.parametrize("numbered", ["arrow", "jsonl.gz", "csv.gz", "txt.gz"], indirect=True)
@pytest.mark.parametrize("damage", ["ends too early", "is overwritten"])
def test_a_file_that_is_damaged_is_refused(numbered: Path, damage: str) -> None:
    (file,) = list_files(str(numbered))
    data = numbered.read_bytes()
    cut = data[:-200] if damage == "ends too early" else data[:600] + bytes(400) + data[1000:]
    if damage == "is overwritten" and file.format.name == "arrow":
        cut = b"\1" * len(data)
    numbered.write_bytes(cut)
    with pytest.raises(GemError, match=f"{numbered.name} cannot be read"):
        count_rows(file)


@pytest.mark.parametrize("numbered", ["parquet", "arrow"], indirect=True)
def test_a_file_without_a_column_that_the_first_has(numbered: Path) -> None:
    (file,) = list_files(str(numbered))
    types = {"text": pa.string(), "m": pa.int64()}
    with pytest.raises(BROKEN_FILE, match="it has no column 'm'"):
        list(read_rows(file, RowRange(0, 10), types, "text"))


def test_bad_json_lines_are_rows_with_problems(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good", "n": 1}',
        b"{not json",
        b'{"text": 7, "n": 2}',
        b'{"text": "caf\xe9", "n": 3}',
        b"[1]",
        b'{"n": 4}',
        b'{"text": "x", "n": "four"}',
        rb'{"text": "half a pair \ud800", "n": 5}',
        b"",
        b'{"text": "good too", "n": 6}',
    ]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join(lines))
    (chunk,) = read_all(path, ["text"])
    problems = {i: problem.split(":")[0] for i, problem in chunk.problems.items()}
    assert problems == {
        1: "not JSON",
        2: "the text is int, not a string",
        3: "invalid UTF-8",
        4: "not a JSON object",
    }
    assert texts([chunk])[0] == b"good"
    assert texts([chunk])[8] == b"good too", "a blank line is no row"
    assert texts([chunk])[5] is None
    with pytest.raises(UnicodeDecodeError):
        texts([chunk])[7].decode()


def test_a_blank_line_of_text_is_a_row(tmp_path: Path) -> None:
    """An empty one, which is reported: its number is the line's."""
    (tmp_path / "in.txt").write_text("one\n\nthree\n")
    assert texts(read_all(tmp_path / "in.txt", ["text"])) == [b"one", b"", b"three"]


def test_a_value_of_another_type_is_the_rows_problem(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    rows = [{"text": "a", "n": 1}] * SAMPLED_ROWS + [{"text": "b", "n": "one"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    chunk = read_all(path, ["text", "n"])[-1]
    assert list(chunk.problems.values()) == ["column 'n' is not int64: 'one'"]
    assert texts([chunk], "n")[-2:] == [1, None]


def test_bad_csv_lines_are_rows_with_problems(tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(b'id,text\n1,one\n2\n3,"two\nlines"\n4,caf\xe9\n')
    (chunk,) = read_all(path, ["text", "id"])
    assert chunk.problems == {1: "1 fields, the first line has 2"}
    assert texts([chunk])[:3] == [b"one", None, b"two\nlines"]
    with pytest.raises(UnicodeDecodeError):
        texts([chunk])[3].decode()


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.jsonl", '{"text": "a"}\n\n \n{"text": "b"}\n\n'), ("rows.csv", "text\na\n\nb\n\n")],
)
def test_blank_lines_are_no_rows(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert texts(read_all(tmp_path / name, ["text"])) == [b"a", b"b"]


def test_parquet_text_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "bytes.parquet"
    pq.write_table(pa.table({"text": pa.array([b"good", b"\xff", None], pa.binary())}), path)
    assert texts(read_all(path, ["text"])) == [b"good", b"\xff", None]


def test_parquet_text_in_other_guises(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    words = pa.array(["a", "b", "a"])
    pq.write_table(pa.table({"text": words.dictionary_encode(), "n": [1, 2, 3]}), path)
    chunks = read_all(path, ["text", "n"])
    assert (texts(chunks), texts(chunks, "n")) == ([b"a", b"b", b"a"], [1, 2, 3])
    with pytest.raises(GemError, match="column 'n' is int64, not text"):
        read_all(path, ["n", "text"])


def test_folders_globs_and_what_they_leave_out(tmp_path: Path) -> None:
    for name in ("b.txt", "sub/a.txt", "_gem/c.txt", ".hidden.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x\n")
    (tmp_path / "cache-0123.arrow").touch()
    names = [Path(file.url).name for file in list_files(str(tmp_path))]
    assert names == ["b.txt", "a.txt"]
    assert [Path(f.url).name for f in list_files(f"{tmp_path}/*.txt")] == [".hidden.txt", "b.txt"]


@pytest.mark.parametrize(
    ("names", "spec", "message"),
    [
        ([], "", "names no file"),
        ([], "missing.txt", "cannot be read"),
        ([], "*.txt", "names no file"),
        (["a.txt", "b.csv"], "", "several formats"),
        (["a.docx"], "a.docx", "give files that end with .parquet"),
        ([], "nofs://x", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused(
    names: list[str], spec: str, message: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("x\n")
    with pytest.raises(GemError, match=message):
        list_files(spec if "://" in spec else str(tmp_path / spec))


def test_a_name_with_the_characters_of_a_glob(tmp_path: Path) -> None:
    (tmp_path / "in[1].txt").write_text("x\n")
    assert texts(read_all(tmp_path / "in[1].txt", ["text"])) == [b"x"]


def test_an_object_store_as_it_lists_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty objects that stand for folders; errors that are no OSError; versions by other names."""
    store = fsspec.filesystem("memory")
    store.pipe("/listed/a.txt", b"x")
    monkeypatch.setattr(type(store), "find", lambda *_: ["/listed/", "/listed/a.txt"])
    info = {"name": "/listed/a.txt", "size": 1, "etag": "v1"}
    monkeypatch.setattr(type(store), "info", lambda *_: info)
    monkeypatch.setattr(type(store), "isdir", lambda *_: True)
    assert [(f.url, f.mark) for f in list_files("memory://listed")] == [
        ("memory:///listed/a.txt", "v1")
    ]

    def refuse(*_: object) -> None:
        raise LookupError("no credentials\nwere found")

    monkeypatch.setattr(type(store), "isdir", refuse)
    with pytest.raises(GemError, match=r"--input memory://listed cannot be read: no credentials$"):
        list_files("memory://listed")


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_text("no")
    with pytest.raises(GemError, match="cannot be read"):
        column_types(list_files(str(path)), ["text"])


def test_a_line_of_an_object_store_is_not_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own files give a line by reading a block, of megabytes, and going back."""
    data = b"".join(b'{"text": "%d"}\n' % i for i in range(5000))
    read: list[int] = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return data[start:end]

        def read(self, length: int = -1) -> bytes:
            read.append(length)
            return super().read(length)

    store = fsspec.filesystem("memory")
    store.pipe("/lines/a.jsonl", data)
    monkeypatch.setattr(type(store), "_open", lambda fs, path, **_: File(fs, path, size=len(data)))
    (file,) = list_files("memory://lines/a.jsonl")
    assert count_rows(file).rows == 5000
    assert len(read) < 10


def test_a_file_that_changes_while_a_job_runs_is_noticed(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("one\ntwo\n")
    plan = Plan({}, list_files(str(tmp_path)), [])
    options = Namespace(input=str(tmp_path))
    (tmp_path / "c.txt").write_text("was not there\n")
    _check_unchanged(plan, options)
    (tmp_path / "b.txt").write_text("one\nand another\n")
    with pytest.raises(JobError, match=r"b\.txt has changed while the job ran \(1 of 2 files"):
        _check_unchanged(plan, options)
