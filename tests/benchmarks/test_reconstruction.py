"""What is counted as found of a text, and the table of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reconstruction import LENGTHS, commits_of, markdown, scores_of, token_f1


def test_token_f1_counts_each_token_as_often_as_it_is_there() -> None:
    assert token_f1([1, 2, 3, 4], [4, 3, 2, 1]) == 1.0
    assert token_f1([1, 1, 2], [1, 3, 3]) == pytest.approx(1 / 3)
    assert token_f1([1, 2], [1, 1, 1, 1]) == pytest.approx(2 / 6)
    assert token_f1([1, 2], [3, 4]) == 0.0


def test_only_the_whole_text_in_its_order_is_a_match() -> None:
    scores = scores_of([([1, 2], [1, 2]), ([1, 2], [2, 1]), ([1, 2], [3, 4]), ([1, 2], [1, 3])])
    assert scores == {"exact": 0.25, "f1": 0.625}


def test_the_table_is_by_k_and_begins_with_what_chance_finds() -> None:
    def result(k: int, commit: str = "abc") -> dict:
        return {
            "scores": {str(length): {"exact": k / 100, "f1": 0.5} for length in LENGTHS},
            "texts": 3,
            "command": f"train k{k}",
            "date": "today",
            "hardware": "a CPU",
            "commit": commit,
        }

    first, second = list(range(32)), list(range(100, 132))
    results = {"16": result(16), "2": result(2), "8": result(8, "def")}
    table = markdown(results, [first, second]).splitlines()
    lines = [line for line in table if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["another text", "2", "8", "16"]
    assert lines[2].count("0.00 / 0.00") == len(LENGTHS)
    assert lines[5].count("0.16 / 0.50") == len(LENGTHS)
    assert table[-2:] == [
        "- k = 2, 16: 3 texts of each length; a CPU, today, commit abc",
        "- k = 8: 3 texts of each length; a CPU, today, commit def",
    ]


def test_a_training_is_of_all_commits_that_it_went_on_with(tmp_path: Path) -> None:
    run = tmp_path / "k1.run"
    assert [commits_of(run, commit) for commit in ("a", "a", "b", "a")] == [
        *("a", "a"),
        *("a, then b", "a, then b"),
    ]
    (tmp_path / "k2.run").mkdir()
    assert commits_of(tmp_path / "k2.run", "a") == "unknown, then a"


def test_the_page_is_of_the_results() -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    found = json.loads((results / "reconstruction.json").read_text())
    page = (results / "reconstruction.md").read_text().splitlines()
    assert set(markdown(found, [[0] * 32, [1] * 32]).splitlines()) - set(page) == {
        f"| another text |{' 0.00 / 0.00 |' * len(LENGTHS)}"
    }
