"""The batch job on a tiny model: every row once, what is wrong reported."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from gem_vllm.errors import GemError
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.job import run_embed_job
from gem_vllm.serving.manifest import DONE
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions
from gem_vllm.serving.processor import EmbedProcessorConfig, build_embed_processor
from gem_vllm.tokens import load_tokenizer
from tests.serving.jobs import (
    ENGINE,
    REPLICAS,
    agreement,
    errors_of,
    jsonl,
    reference,
    reference_answers,
    sentence,
    table_of,
)


@pytest.mark.usefixtures("cluster")
def test_vectors_are_the_references_in_the_inputs_order(model: Path, tmp_path: Path) -> None:
    options = EmbedOptions(
        model=model,
        input=str(jsonl(tmp_path / "in.jsonl", 150)),
        output=str(tmp_path / "out"),
        id_column="id",
        keep=("text",),
        generate="Say {text} in one word.",
        max_tokens=3,
        rows_per_shard=40,
    )
    reports: list[dict[str, Any]] = []
    summary = run_embed_job(options, REPLICAS, reports.append)
    table = table_of(options.output)
    assert table["id"].to_pylist() == list(range(150))
    assert table["text"].to_pylist() == [sentence(i) for i in range(150)]
    assert agreement(table["embedding"], reference(model, table["text"].to_pylist())) >= 0.9999
    assert all(isinstance(text, str) for text in table["generated"].to_pylist())
    answers, tokens = reference_answers(
        model, [f"Say {sentence(i)} in one word." for i in range(150)], options.max_tokens
    )
    assert table["generated"].to_pylist() == answers
    texts = load_tokenizer(model)(table["text"].to_pylist())["input_ids"]
    assert summary["tokens"] == tokens + sum(map(len, texts))
    assert (summary["rows_in"], summary["rows_embedded"], summary["shards"]) == (150, 150, 4)
    assert reports[-1]["rows_done"] == reports[-1]["rows"] == 150
    metadata = pq.read_schema(Path(options.output) / "part-00000.parquet").metadata
    assert metadata[b"gem.checkpoint_sha256"].decode() == summary["checkpoint_sha256"]

    # Once more: nothing is left to do. Then, with a shard and a half gone, just these.
    again = run_embed_job(options, REPLICAS)
    assert again["this_run"]["rows"] == 0
    Path(options.output, DONE, "00001.json").unlink()
    Path(options.output, DONE, "00003.json").unlink()
    assert run_embed_job(options, REPLICAS)["this_run"]["rows"] == 40 + 30
    assert table_of(options.output)["id"].to_pylist() == list(range(150))
    with pytest.raises(GemError, match="dtype was 'float32', is 'int8'"):
        run_embed_job(replace(options, dtype="int8"), REPLICAS)


BAD_ROWS = (
    ({"id": 1, "text": None}, "the text is null"),
    ({"id": 2, "text": ""}, "the text is empty"),
    ({"id": 3, "text": "bread " * 400}, "maximum context length is 256 tokens"),
    ({"id": 4, "text": "a <|gem_0|> b"}, "reserved GEM token <|gem_0|>"),
    ({"id": 5, "text": 12}, "the text is int, not a string"),
    ({"id": None, "text": "no id"}, "column 'id' is null"),
)


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("on_error", ["skip", "null"])
def test_bad_rows_are_reported_and_the_counts_add_up(
    on_error: str, model: Path, tmp_path: Path
) -> None:
    rows: list[dict[str, Any] | str] = [{"id": 100 + i, "text": sentence(i)} for i in range(20)]
    rows[5:5] = [row for row, _ in BAD_ROWS]
    lines = [json.dumps(row) for row in rows] + ["{torn"]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    options = EmbedOptions(
        model=model,
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out"),
        id_column="id",
        dtype="float16",
        generate="Say {text} in one word.",
        max_tokens=3,
        on_error=on_error,
    )
    if on_error == "skip":  # after a run that may have none, which ends with the first
        with pytest.raises(JobError, match=r"jsonl row 5: the text is null. Go on with --on-error"):
            run_embed_job(replace(options, on_error="fail"), REPLICAS)
        assert not list(Path(options.output).glob("part-*"))
    summary = run_embed_job(options, REPLICAS)
    assert (summary["rows_in"], summary["rows_embedded"], summary["rows_reported"]) == (27, 20, 7)
    errors = errors_of(options.output)
    assert [error["row"] for error in errors] == [5, 6, 7, 8, 9, 10, 26]
    for error, (_, reason) in zip(errors, BAD_ROWS, strict=False):
        assert reason in error["reason"]
    assert errors[-1]["reason"].startswith("not JSON")
    table = table_of(options.output)
    missing = [vector is None for vector in table["embedding"].to_pylist()]
    assert sum(missing) == (7 if on_error == "null" else 0)
    good = table.filter(pa.array([not none for none in missing]))
    assert good["id"].to_pylist() == list(range(100, 120))
    assert agreement(good["embedding"], reference(model, [sentence(i) for i in range(20)])) > 0.999
    # Of a row that is bad there is neither; the others have their own.
    assert [answer is None for answer in table["generated"].to_pylist()] == missing
    prompts = [f"Say {sentence(i)} in one word." for i in range(20)]
    assert good["generated"].to_pylist() == reference_answers(model, prompts, 3)[0]


@pytest.mark.usefixtures("cluster")
def test_a_file_that_ends_too_early_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    data = gzip.compress(b"a river\n" * 1000)
    (tmp_path / "in.txt.gz").write_bytes(data[:-10])
    options = EmbedOptions(
        model=model, input=str(tmp_path / "in.txt.gz"), output=str(tmp_path / "out")
    )
    with pytest.raises(GemError, match=r"^\S*in.txt.gz cannot be read: [^\n]*$"):
        run_embed_job(options, REPLICAS)
    assert not Path(options.output).exists()


def test_an_engine_option_that_is_none_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    options = EmbedOptions(model=model, input=str(tmp_path / "in.txt"), output=str(tmp_path / "o"))
    with pytest.raises(GemError, match="--engine cannot set max_modellen"):
        run_embed_job(options, ReplicaOptions(engine={"max_modellen": 64}))
    assert not Path(options.output).exists()


@pytest.mark.usefixtures("cluster")
def test_an_engine_that_cannot_start_ends_the_job_with_its_reason(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.txt").write_text("one\n")
    options = EmbedOptions(model=model, input=str(tmp_path / "in.txt"), output=str(tmp_path / "o"))
    refused = {"additional_config": {"gem_tokens_beside_chat": 0}}
    replicas = ReplicaOptions(engine={**ENGINE, **refused})
    with pytest.raises(JobError, match="gem_tokens_beside_chat in --additional-config is 0"):
        run_embed_job(options, replicas)


@pytest.mark.usefixtures("cluster")
def test_a_processor_adds_embeddings_to_any_dataset(model: Path) -> None:
    texts = [sentence(i) for i in range(60)]
    config = EmbedProcessorConfig(model=model, batch_size=16, replicas=REPLICAS)
    rows = ray.data.from_items([{"n": i, "text": text} for i, text in enumerate(texts)])
    embedded = sorted(build_embed_processor(config)(rows).take_all(), key=lambda row: row["n"])
    assert [row["text"] for row in embedded] == texts
    vectors = pa.chunked_array([pa.array([row["embedding"].tolist() for row in embedded])])
    assert agreement(vectors, reference(model, texts)) >= 0.9999
