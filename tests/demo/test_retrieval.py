"""The sentence-to-paragraph task and its score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from gem_vllm.demo.retrieval import RetrievalTask, embed_with_base, load_task, nearest, score
from gem_vllm.errors import GemError
from tests.tiny import make_tiny_base

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def unit(*rows: tuple[float, ...]) -> np.ndarray:
    array = np.array(rows, dtype=np.float32)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_score_counts_ranks() -> None:
    passages = unit((1, 0), (0, 1), (1, 1))
    perfect = score(unit((1, 0), (0, 1)), passages)
    assert (perfect.accuracy_at_1, perfect.mrr_at_10) == (1.0, 1.0)
    swapped = score(unit((0, 1), (0, 1)), passages)  # the first query's own passage comes third
    assert swapped.accuracy_at_1 == pytest.approx(1 / 2)
    assert swapped.mrr_at_10 == pytest.approx((1 / 3 + 1) / 2)


def test_ties_and_ranks_behind_ten_give_nothing() -> None:
    passages = np.ones((12, 1), dtype=np.float32)
    result = score(passages[:1], passages)
    assert (result.accuracy_at_1, result.mrr_at_10) == (0.0, 0.0)


def test_nearest_is_sorted() -> None:
    passages = unit((1, 0), (0, 1), (1, 1))
    found = nearest(np.array([0, 1], dtype=np.float32), passages, 2)
    assert [row for row, _ in found] == [1, 2]
    assert found[0][1] == pytest.approx(1.0)


def test_the_query_is_the_longest_sentence_behind_the_first(tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    file.write_text("A first and longest sentence here. Short one. A longer one!\nOnly one here.\n")
    task = load_task(file, passages=2, queries=2)
    assert task.queries == ["A longer one!", "Only one here."]
    assert load_task(file, passages=2, queries=1).queries == ["A longer one!"]


def test_a_short_or_missing_file_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "passages.txt"
    with pytest.raises(GemError, match="does not exist"):
        load_task(file, passages=2, queries=1)
    file.write_text("One passage.\n")
    with pytest.raises(GemError, match="has 1 passages; 2 are needed"):
        load_task(file, passages=2, queries=1)


def test_the_shipped_text_is_small_and_not_shared_between_the_files() -> None:
    files = [EXAMPLES / name for name in ("wikipedia_train.txt", "wikipedia_held_back.txt")]
    train, held_back = (file.read_text(encoding="utf-8").splitlines() for file in files)
    assert sum(file.stat().st_size for file in files) <= 1_000_000
    assert len(set(held_back)) == len(held_back) >= 500
    assert set(train).isdisjoint(held_back)
    assert "BY-SA" in (EXAMPLES / "README.md").read_text()


def test_base_embeddings_are_mean_pooled_text_by_text(tmp_path: Path) -> None:
    make_tiny_base("llama", tmp_path)
    task = RetrievalTask(passages=["one two three", "four", "five six"], queries=["two"])
    result = embed_with_base(tmp_path, task, max_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    embeddings = [*result.queries, *result.passages]
    for text, got in zip([*task.queries, *task.passages], embeddings, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0).numpy()
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert result.tokens_per_second > 0
