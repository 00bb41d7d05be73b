"""Questions by whose words their passage is found again."""

from __future__ import annotations

import pytest

from gem_vllm.training import round_trip
from gem_vllm.training.round_trip import found_again
from tests.imports import imported

RIVER = "The river rises in the hills of Cork and flows east for ninety miles."
BREAD = "The bread is baked in a wood oven for an hour, from rye and wheat."
MOON = "The moon goes around the earth in a month, and shows it one face alone."


def test_kept_is_what_leads_back_to_its_passage() -> None:
    pairs = [
        ("where does the river rise", RIVER),
        ("how long is bread baked in the oven", BREAD),
        ("who bakes rye bread", MOON),  # of another passage's words
        ("what is it called", RIVER),  # of several passages
        ("what is it called", MOON),
        ("qwertz", MOON),  # of no passage's words
    ]
    assert list(found_again([*pairs, pairs[0]])) == pairs[:2]


def test_passages_are_told_apart_within_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trip, "PASSAGES_AT_ONCE", 2)
    pairs = [("the river's hills", RIVER), ("rye and wheat", BREAD), ("one face", MOON)]
    assert list(found_again(pairs)) == pairs


def test_of_nothing_nothing_is_kept() -> None:
    assert list(found_again([])) == []
    assert list(found_again([("?", "!"), ("!", "?")])) == []


def test_search_leaves_numba_out_of_this_process() -> None:
    # Beside llvmlite, vLLM 0.32 starts no engine on the CPU.
    code = (
        "from gem_vllm.training.round_trip import found_again\n"
        "assert list(found_again([('of rivers', 'rivers run'), ('of hills', 'hills rise')]))\n"
    )
    assert imported(code, "bm25s", "numba", "llvmlite") == []
