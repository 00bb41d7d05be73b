"""What tests of the batch job share: texts, a small engine, its output, the command line."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.serving.manifest import DONE, ERRORS
from gem_vllm.serving.options import ReplicaOptions
from gem_vllm.tokens import load_tokenizer

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 256,
    "max_num_batched_tokens": 512,
}
REPLICAS = ReplicaOptions(engine=ENGINE)
# For what a job does, the start of Ray and of its engines included.
WAIT_SECONDS = 400
WORDS = ("river", "bridge", "library", "moon", "bread", "capital", "France", "water", "rock")


def sentence(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(2 + i % 40)) + f" {i}"


def table_of(output: str) -> pa.Table:
    parts = sorted(Path(output).glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts])


def errors_of(output: str) -> list[dict[str, Any]]:
    parts = sorted(Path(output, ERRORS).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def finished_shards(output: Path) -> int:
    return len(list((output / DONE).glob("[0-9]*.json")))


def reference(model: Path, texts: list[str]) -> torch.Tensor:
    tokenizer = load_tokenizer(model)
    return ReferenceEmbedder(model).embed([tokenizer(text)["input_ids"] for text in texts])


@cache
def reference_of_rows(model: Path, count: int) -> torch.Tensor:
    """The reference's vectors of the rows of `jsonl`."""
    return reference(model, [sentence(i) for i in range(count)])


def reference_answers(model: Path, prompts: list[str], max_tokens: int) -> tuple[list[str], int]:
    """The reference's greedy answers to prompts, each a chat; and the tokens of both together."""
    embedder = ReferenceEmbedder(model)
    tokenizer, answers, tokens = embedder.tokenizer, list[str](), 0
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        spelled = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(spelled, add_special_tokens=False)["input_ids"]
        new = embedder.generate(ids, max_tokens)
        # As the engine, which gives out no character whose bytes are not all there.
        said = (tokenizer.decode(new[:n], skip_special_tokens=True) for n in range(len(new), 0, -1))
        answers.append(next((text for text in said if not text.endswith("\ufffd")), ""))
        tokens += len(ids) + len(new)
    return answers, tokens


def agreement(embeddings: pa.ChunkedArray, expected: torch.Tensor) -> float:
    have = torch.tensor(np.stack(embeddings.to_pylist()))
    return float(torch.nn.functional.cosine_similarity(have.double(), expected.double()).min())


def check_all_rows(model: Path, output: Path, count: int) -> None:
    """Every row of `jsonl` once, in order, with the reference's vector; nothing half written."""
    table = table_of(str(output))
    assert table["id"].to_pylist() == list(range(count))
    assert agreement(table["embedding"], reference_of_rows(model, count)) >= 0.9999
    assert not list(output.rglob(".*"))


def jsonl(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"id": i, "text": sentence(i)}) + "\n" for i in range(count))
    )
    return path


def embed_command(model: Path, folder: Path | str) -> list[str]:
    return [
        *(sys.executable, "-m", "gem_vllm.cli", "embed", "--model", str(model)),
        *("--input", f"{folder}/in.jsonl", "--output", f"{folder}/out"),
        *("--id-column", "id", "--rows-per-shard", "50", "--engine", json.dumps(ENGINE)),
    ]
