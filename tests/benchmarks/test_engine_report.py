"""The engine benchmark's arithmetic and tables, from a made-up result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_facts import weight_bytes
from engine_loads import CPU, FULL, mixed_amounts, mixed_loads, solo_amount
from engine_report import markdown, ratios, ratios_by_round
from safetensors.torch import save_file
from wikipedia_texts import texts_of_length


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "about": {"hardware": "a CPU", "commit": "abc"},
        "k": 1,
        "solo": {
            "embed 30": {
                "gem": [19.0, 40.0, 9.8],
                "pooling": [20.0, 41.0, 10.0],
                "transformers": [8.0, 16.0, 4.0],
            },
            "embed 230": {"gem": [3.0] * 3, "pooling": [3.0] * 3, "transformers": [2.0] * 3},
            "generate": {"gem": [99.0] * 3, "generating": [100.0] * 3},
        },
        "mixed": {
            "50": {"texts": 80, "completions": 20, "one": [10.0] * 3, "two": [12.0, 11.0, 9.0]},
            "90": {"texts": 144, "completions": 4, "one": [10.0] * 3, "two": [18.0] * 3},
            "10": {"texts": 16, "completions": 36, "one": [10.0] * 3, "two": [15.0] * 3},
        },
        "memory": {
            "one": {"weights": 548_000_000, "resident": 2_000_000_000},
            "two": {"weights": 1_076_000_000, "resident": 4_000_000_000},
        },
    }


def test_rounds_are_compared_with_each_other(result: dict[str, Any]) -> None:
    # Twice as fast a machine in the second round: the medians' own ratio would be 3 / 4.
    result["solo"] = {"generate": {"gem": [2.0, 6.0, 3.0], "generating": [2.0, 6.0, 4.0]}}
    assert ratios_by_round(result)["generate"] == [1.0, 1.0, 0.75]
    assert ratios(result)["generate"] == 1.0
    result["solo"]["generate"]["generating"].pop()
    with pytest.raises(ValueError, match="shorter"):
        ratios_by_round(result)


def test_ratios(result: dict[str, Any]) -> None:
    assert ratios(result) == {
        "embed 30": 0.976,
        "embed 230": 1.0,
        "generate": 0.99,
        "mixed 50/50": 1.1,
        "mixed 90/10": 1.8,
        "mixed 10/90": 1.5,
        "weight memory": 0.509,
    }


def test_page_shows_ratios_and_medians(result: dict[str, Any]) -> None:
    lines = markdown(result).splitlines()
    for line in (
        "| embed 30 | 0.98 | 0.96 to 0.98 | >= 0.97 |",
        "| mixed 90/10 | 1.80 | 1.80 to 1.80 | >= 1.4 |",
        "| weight memory | 0.51 |  |  |",
        "| embed, texts of about 30 tokens | texts/s | 19.0 | 20.0 | 8.0 |",
        "| generate, many at once | tokens/s | 99.0 | 100.0 |  |",
        "| 50 / 50 | 80 | 20 | 10.0 | 11.0 |",
        "| weights | 548 MB | 1076 MB |",
        "| hardware | a CPU |",
    ):
        assert line in lines


def test_embeddings_of_several_special_tokens_have_an_aim_of_their_own(
    result: dict[str, Any],
) -> None:
    rows = [line.split(" | ") for line in markdown({**result, "k": 8}).splitlines()]
    aims = {row[0].removeprefix("| "): row[-1] for row in rows if len(row) == 4}
    assert aims["embed 30"] == aims["embed 230"] == ">= 0.95 |"
    assert aims["generate"] == ">= 0.97 |"


def test_every_table_is_rectangular(result: dict[str, Any]) -> None:
    blocks = [block for block in markdown(result).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_texts_have_their_lengths_and_start_with_a_paragraph() -> None:
    paragraphs = [[i] * 5 for i in range(8)]
    texts = texts_of_length(paragraphs, 4, 6)
    assert texts == [[0] * 4, [1] * 5, [2] * 5 + [3], [4] * 4, [5] * 5, [6] * 5 + [7]]
    assert texts_of_length(paragraphs, 100, 100) == []


def test_weights_count_in_the_engine_s_dtype(tmp_path: Path) -> None:
    tensors = {
        "model.w": torch.zeros(4, 2, dtype=torch.bfloat16),
        "lm_head.w": torch.zeros(3, dtype=torch.bfloat16),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert weight_bytes(tmp_path, "auto") == 22
    assert weight_bytes(tmp_path, "float32") == 44
    assert weight_bytes(tmp_path, "float32", only="lm_head.") == 12
    assert weight_bytes(tmp_path / "absent", "float32") == 0


def test_a_turn_lasts_as_long_as_asked() -> None:
    assert solo_amount("embed 30", 15.0, 3.0, 32) == 45
    assert solo_amount("embed 230", 0.1, 3.0, 32) == 1
    # Whole groups, so that a group's last steps are as full as its first.
    assert solo_amount("generate", 30.0, 3.0, 32) == 96
    assert solo_amount("generate", 4.0, 3.0, 32) == 32


def test_longer_turns_have_completions_of_the_same_length() -> None:
    longer = FULL.longer(4)
    assert (longer.solo_seconds, longer.mixed_seconds) == (12.0, 24.0)
    assert longer.max_tokens == FULL.max_tokens


def test_mixed_work_is_divided_by_the_time_that_it_takes() -> None:
    per_second = {"embed 30": 20.0, "generate": 5.0}
    assert mixed_amounts(0.9, per_second, 6.0) == (108, 3)
    loads = mixed_loads(108, 3, CPU)
    assert loads["embed"]["generate"] == loads["generate"]["embed"] == 0
    assert (loads["one"]["embed"], loads["one"]["generate"]) == (108, 3)
    assert loads["one"]["embed_in_flight"] == loads["embed"]["embed_in_flight"]
    assert loads["one"]["generate_in_flight"] == loads["generate"]["generate_in_flight"]
