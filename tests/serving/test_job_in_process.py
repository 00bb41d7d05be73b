"""Jobs in this process, without Ray, and with a stand-in for vLLM's engine.

Which rows are in which chunk and shard, whatever is wrong with some, and what a job checks before
it says that all of them are there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_vllm.serving import job as job_module
from gem_vllm.serving import processor as processor_module
from gem_vllm.serving import replica as replica_module
from gem_vllm.serving.columnar import CHUNK_ROWS
from gem_vllm.serving.engine import Answer, BadRow
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.inputs import count_rows
from gem_vllm.serving.job import run_embed_job
from gem_vllm.serving.manifest import DONE, SUMMARY
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions
from gem_vllm.serving.processor import EmbedProcessorConfig, RowEmbedder
from gem_vllm.serving.replica import CHUNKS_IN_FLIGHT
from tests.serving.jobs import errors_of, finished_shards, jsonl, table_of

ROWS, ROWS_PER_SHARD = 40, 20
TOO_LONG, NO_ANSWER = "it is too long", "it has no answer"


class Engine:
    """In an `EngineThread`'s place: a text that ends with 7 has the vector (7, 1).

    A prompt is answered with itself. A text with `TOO_LONG` in it is not embedded, a prompt with
    `NO_ANSWER` in it not answered.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def embed(self, texts: Sequence[str]) -> list[Future[Answer]]:
        vectors = [np.array([float(text.split()[-1]), 1], dtype=np.float32) for text in texts]
        return [
            _future(Answer(vector, None, tokens=2), text, TOO_LONG)
            for vector, text in zip(vectors, texts, strict=True)
        ]

    def generate(self, prompts: Sequence[str]) -> list[Future[Answer]]:
        return [_future(Answer(None, prompt, tokens=3), prompt, NO_ANSWER) for prompt in prompts]


def _future(answer: Answer, text: str, refused: str) -> Future[Answer]:
    future: Future[Answer] = Future()
    if refused in text:
        future.set_exception(BadRow(refused))
    else:
        future.set_result(answer)
    return future


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One replica, without an engine, does a shard when the job asks for the next one's counts."""

    def map_in_pool(
        rows: Iterable[Mapping[str, Any]],
        actor: type,
        *_: Any,
        arguments: Mapping[str, Any],
        **__: Any,
    ) -> Any:
        replica = actor(**arguments, engine={})

        def iter_rows() -> Iterator[dict[str, Any]]:
            for row in rows:
                done = replica({name: np.array([value]) for name, value in row.items()})
                yield {name: values[0] for name, values in done.items()}

        return SimpleNamespace(iter_rows=iter_rows)

    context = SimpleNamespace(get_actor_id=lambda: "replica")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray.data, "from_items", lambda rows, **_: rows)
    monkeypatch.setattr(job_module, "ray_cluster", contextlib.nullcontext)
    monkeypatch.setattr(job_module, "map_in_pool", map_in_pool)
    monkeypatch.setattr(job_module, "_count", lambda files: [count_rows(file) for file in files])
    monkeypatch.setattr(replica_module, "JobMetrics", Mock())
    monkeypatch.setattr(replica_module, "EngineThread", Engine)
    monkeypatch.setattr(processor_module, "EngineThread", Engine)


# By row: its text, and what is said of it. In chunks behind the first, at the ends of shards.
BAD_ROWS = {
    555: (None, "the text is null"),
    1999: (f"{TOO_LONG} 1999", TOO_LONG),
    2000: (f"{NO_ANSWER} 2000", NO_ANSWER),
    2555: (None, "the text is null"),
    2599: ("", "the text is empty"),
}


@pytest.mark.parametrize("on_error", ["skip", "null"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_keep_their_numbers_in_every_chunk_and_shard(
    ending: str, on_error: str, model: Path, tmp_path: Path
) -> None:
    rows, rows_per_shard = 2600, 2000
    assert rows_per_shard > CHUNKS_IN_FLIGHT * CHUNK_ROWS
    assert rows - rows_per_shard > CHUNK_ROWS
    texts = [BAD_ROWS[i][0] if i in BAD_ROWS else f"text {i}" for i in range(rows)]
    path = tmp_path / f"in.{ending}"
    if ending == "parquet":
        pq.write_table(pa.table({"text": texts, "n": range(rows)}), path, row_group_size=700)
    else:
        path.write_text(
            "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts))
        )
    options = EmbedOptions(
        model=model,
        input=str(path),
        output=str(tmp_path / "out"),
        keep=("n", "text"),
        dimensions=2,
        generate="Say {text}",
        on_error=on_error,
        rows_per_shard=rows_per_shard,
    )
    with pytest.raises(JobError, match=rf"in\.{ending} row 555: the text is null\. Go on with"):
        run_embed_job(replace(options, on_error="fail"), ReplicaOptions())
    reports: list[dict[str, Any]] = []
    summary = run_embed_job(options, ReplicaOptions(), reports.append)

    written = [i for i in range(rows) if on_error == "null" or i not in BAD_ROWS]
    table = table_of(options.output).to_pydict()
    assert table["id"] == [f"{path}:{i}" for i in written]
    assert table["n"] == written
    assert table["text"] == [texts[i] for i in written]
    assert table["embedding"] == [None if i in BAD_ROWS else [i, 1] for i in written]
    assert table["generated"] == [None if i in BAD_ROWS else f"Say text {i}" for i in written]
    assert errors_of(options.output) == [
        {"file": str(path), "row": i, "id": f"{path}:{i}", "reason": reason}
        for i, (_, reason) in BAD_ROWS.items()
    ]
    assert [report["rows_done"] for report in reports] == [rows_per_shard, rows]
    counts = {name: summary[f"rows_{name}"] for name in ("in", "embedded", "reported", "written")}
    bad = len(BAD_ROWS)
    assert counts == {
        "in": rows,
        "embedded": rows - bad,
        "reported": bad,
        "written": len(written),
    }


@pytest.fixture
def options(model: Path, tmp_path: Path) -> EmbedOptions:
    """A job of two shards."""
    return EmbedOptions(
        model=model,
        input=str(jsonl(tmp_path / "in.jsonl", ROWS)),
        output=str(tmp_path / "out"),
        id_column="id",
        dimensions=2,
        rows_per_shard=ROWS_PER_SHARD,
    )


def check_whole(options: EmbedOptions) -> None:
    """Every row once, with its vector; nothing half written."""
    table = table_of(options.output).to_pydict()
    assert table["id"] == list(range(ROWS))
    assert table["embedding"] == [[i, 1] for i in range(ROWS)]
    assert not list(Path(options.output).rglob(".*"))


def test_an_input_that_is_another_at_the_end_ends_the_job(options: EmbedOptions) -> None:
    with pytest.raises(JobError, match=r"in\.jsonl has changed while the job ran \(1 of 1 files"):
        run_embed_job(options, ReplicaOptions(), lambda _: os.utime(options.input, (1, 1)))
    assert not Path(options.output, SUMMARY).exists()


def test_an_input_that_has_become_shorter_is_noticed_as_it_is_read(options: EmbedOptions) -> None:
    lines = Path(options.input).read_text().splitlines(keepends=True)

    def shorten(_: dict[str, Any]) -> None:
        Path(options.input).write_text("".join(lines[:30]))

    told = r"in\.jsonl: 20 rows were counted from 20 on, and 10 found; the file has changed\."
    with pytest.raises(JobError, match=told):
        run_embed_job(options, ReplicaOptions(), shorten)
    assert finished_shards(Path(options.output)) == 1


def test_a_file_that_is_gone_at_the_end_is_missed(options: EmbedOptions) -> None:
    def lose(_: dict[str, Any]) -> None:
        Path(options.output, "part-00000.parquet").unlink(missing_ok=True)

    with pytest.raises(JobError, match=r"^1 of 2 shards are not finished \(first: 00000\); run"):
        run_embed_job(options, ReplicaOptions(), lose)
    assert not Path(options.output, SUMMARY).exists()
    assert run_embed_job(options, ReplicaOptions())["this_run"]["rows"] == ROWS_PER_SHARD
    check_whole(options)


@pytest.mark.parametrize("name", ["rows", "embedded", "reported"])
def test_counts_that_do_not_add_up_end_the_job(name: str, options: EmbedOptions) -> None:
    run_embed_job(options, ReplicaOptions())
    marker = Path(options.output, DONE, "00001.json")
    counts = json.loads(marker.read_text())
    marker.write_text(json.dumps({**counts, name: counts[name] + 1}))
    told = f"^the input has 40 rows, the shards' counts in _gem/done are .*'{name}': "
    with pytest.raises(JobError, match=told):
        run_embed_job(options, ReplicaOptions())


@pytest.mark.parametrize("on_error", ["fail", "skip", "null"])
def test_a_row_less_in_a_file_than_was_counted_ends_the_job(
    on_error: str, options: EmbedOptions
) -> None:
    options = replace(options, on_error=on_error)
    run_embed_job(options, ReplicaOptions())
    part = Path(options.output, "part-00000.parquet")
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(JobError, match=r"^the files hold 39 rows, 40 were counted as written$"):
        run_embed_job(options, ReplicaOptions())


def test_a_full_disk_ends_the_job_and_space_finishes_it(
    options: EmbedOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    told = r"out cannot be written: .*No space left on device\. Mend that, and run the same command"
    with monkeypatch.context() as disk, pytest.raises(JobError, match=told):
        run_embed_job(
            options,
            ReplicaOptions(),
            lambda _: disk.setattr(pq.ParquetWriter, "write_table", refuse),
        )
    assert finished_shards(Path(options.output)) == 1
    assert not Path(options.output, "part-00001.parquet").exists()
    assert run_embed_job(options, ReplicaOptions())["this_run"]["rows"] == ROWS_PER_SHARD
    check_whole(options)


def batch_of(*texts: Any) -> dict[str, np.ndarray]:
    return {"text": np.array(texts, dtype=object), "n": np.arange(len(texts))}


def test_a_processor_adds_to_a_batch(model: Path) -> None:
    embedder = RowEmbedder(EmbedProcessorConfig(model=model), {})
    embedded = embedder(batch_of("text 3", "text 5"))
    assert {name: list(values) for name, values in embedded.items() if name != "embedding"} == {
        "text": ["text 3", "text 5"],
        "n": [0, 1],
    }
    np.testing.assert_array_equal(embedded["embedding"], [[3, 1], [5, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "column 'text' has None, which is no text"),
        ("", "column 'text' has '', which is no text"),
        (7, "column 'text' has 7, which is no text"),
        (float("nan"), "column 'text' has nan, which is no text"),
        (f"{TOO_LONG} 1", f"'{TOO_LONG} 1': {TOO_LONG}"),
    ],
)
def test_a_row_of_a_processor_that_cannot_be_embedded_fails_it(
    text: Any, message: str, model: Path
) -> None:
    embedder = RowEmbedder(EmbedProcessorConfig(model=model), {})
    with pytest.raises(BadRow, match=f"^{message}$"):
        embedder(batch_of("text 3", text, "text 5"))
