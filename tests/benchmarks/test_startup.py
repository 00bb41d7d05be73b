"""What a GEM checkpoint adds to a start is taken within a round, in an order that turns round."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import startup


def test_what_is_added_is_the_median_of_the_rounds_differences() -> None:
    page = startup.markdown(
        {
            # Slower from round to round: the medians' own difference would be 9 s.
            "seconds": {"base": [40.0, 41.0, 50.0], "GEM checkpoint": [40.5, 50.0, 51.0]},
            "hardware": "a CPU",
            "vllm": "0.32.0",
            "date": "today",
            "commit": "abc",
            "command": "startup.py",
        }
    )
    assert "differences: +1.0 s (+0.5 to +9.0) of 41.0 s." in page
    assert "| GEM checkpoint | 50.0 | 40.5 to 51.0 |" in page


def test_none_is_always_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start_seconds(folder: Path, environment: Mapping[str, str]) -> float:
        assert environment == ({"VLLM_PLUGINS": ""} if folder.name == "base" else {})
        started.append(folder.name)
        return float(len(started))

    monkeypatch.setattr(startup, "start_seconds", start_seconds)
    seconds = startup.measure({"base": tmp_path / "base", "GEM": tmp_path / "gem"}, rounds=2)
    assert started == ["base", "gem", "gem", "base", "base", "gem"]
    assert seconds == {"base": [4.0, 5.0], "GEM": [3.0, 6.0]}
