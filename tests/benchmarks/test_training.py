"""The training benchmark: turns, ratios within a round, and rounds that are not lost."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gem_vllm.errors import GemError

ROOT = Path(__file__).resolve().parents[2]
BASE = "SmolLM2-135M-Instruct"


@pytest.fixture
def training() -> Any:
    """The script, by its path: its name is also that of the trainer's folder."""
    spec = importlib.util.spec_from_file_location(
        "training_benchmark", ROOT / "benchmarks" / "training.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def peers(training: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The peers that have run, in order, without what they would do; the fifth fails."""
    ran: list[str] = []

    def run(peer: str, *args: Any) -> dict[str, Any]:
        ran.append(peer)
        if len(ran) == 5:
            sys.exit(f"{peer} failed")
        return {"seconds": [float(len(ran))], "tokens": 100, "peak_bytes": 1 << 20}

    monkeypatch.setattr(training, "run", run)
    monkeypatch.setattr(training, "write_pairs", lambda args, file: file)
    monkeypatch.setattr(training, "hardware", lambda: "a CPU")
    return ran


def command(out: Path, *words: str) -> list[str]:
    return ["training.py", "--base", f"models/{BASE}", "--out", str(out), *words]


def test_rounds_are_compared_with_each_other(training: Any) -> None:
    # Twice as slow a machine in the second round: the medians' own ratio would be 1.25.
    rounds = {
        "forward": [(1.0, 100), (2.0, 100), (4.0, 100)],
        "gem adapter": [(2.0, 300), (4.0, 100), (2.5, 200)],
    }
    section = training.section(
        {
            "tokens": 64,
            "pairs": 32,
            "special_tokens": 1,
            "dtype": "bfloat16",
            "about": {"hardware": "a CPU"},
            "rounds": {
                peer: [
                    {"seconds": [9.0, step, 0.1], "tokens": 4096, "peak_bytes": mib << 20}
                    for step, mib in of_peer
                ]
                for peer, of_peer in rounds.items()
            },
        }
    )
    for line in (
        "| gem adapter | 2.500 | 1,638 | 200 |",
        "| a step, in forward passes | 2.00 | 1.3 |",
        "| memory, against the forward pass | 2.00 | 1.2 |",
    ):
        assert line in section
    with pytest.raises(ValueError, match="shorter"):
        training.ratio([1.0, 2.0], [1.0])


def test_the_page_is_of_the_results(training: Any) -> None:
    results = ROOT / "benchmarks" / "results"
    page = training.markdown(json.loads((results / "training.json").read_text()))
    assert page == (results / "training.md").read_text()


def test_a_peer_that_fails_costs_its_own_round_alone(
    training: Any, peers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--rounds", "3", "--peers", "forward", "gem adapter")
    monkeypatch.setattr(sys, "argv", command(tmp_path, *words))
    with pytest.raises(SystemExit, match="forward failed"):
        training.main()
    assert peers == ["forward", "gem adapter", "gem adapter", "forward", "forward"]
    rounds = json.loads((tmp_path / "training.json").read_text())[f"{BASE}, a CPU"]["rounds"]
    assert [each["seconds"] for each in rounds["forward"]] == [[1.0], [4.0]]
    assert [each["seconds"] for each in rounds["gem adapter"]] == [[2.0], [3.0]]
    assert "rounds: 2." in (tmp_path / "training.md").read_text()


def test_no_other_peers_and_settings_are_replaced(
    training: Any, peers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--rounds", "1", "--peers", "forward", "gem adapter")
    monkeypatch.setattr(sys, "argv", command(tmp_path, *words))
    training.main()
    before = (tmp_path / "training.json").read_bytes()
    for others, lost in (
        (("--rounds", "1", "--peers", "forward"), "rounds of 'gem adapter'"),
        ((*words, "--tokens", "32"), "tokens 64"),
    ):
        monkeypatch.setattr(sys, "argv", command(tmp_path, *others))
        with pytest.raises(GemError, match=f"has {lost} of {BASE}, a CPU, .*another --out"):
            training.main()
    assert (tmp_path / "training.json").read_bytes() == before
    assert len(peers) == 2
