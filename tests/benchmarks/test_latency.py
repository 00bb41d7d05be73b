"""The latency benchmark's turns, arithmetic and page, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latency
import pytest
from latency_report import markdown, plot, ratio_to
from matplotlib.axes import Axes

Request = tuple[str, str, dict[str, Any]]


@pytest.fixture
def result() -> dict[str, Any]:
    def rounds(*milliseconds: float, texts: float) -> list[dict[str, Any]]:
        """Chats of one speed, with a gap in a hundred of five times the others, by round."""
        return [
            {
                "per_token": [ms / 1000] * 3,
                "gaps": [ms / 1000] * 99 + [ms / 200],
                "embedded": texts + n,
            }
            for n, ms in enumerate(milliseconds)
        ]

    return {
        "ask": {"one engine": [0.1, 0.2, 0.3], "two engines": [1.0, 1.0, 1.0]},
        "beside": {
            # Twice as slow a machine in the last round.
            "alone": rounds(20.0, 20.0, 40.0, texts=0.0),
            "None": rounds(200.0, 300.0, 400.0, texts=5000.0),
            "64": rounds(30.0, 40.0, 80.0, texts=2000.0),
        },
        "about": {"hardware": "a CPU", "rounds": "3"},
    }


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What the engines are asked for, in order; each request takes a second more than the last."""
    asked: list[Request] = []

    def request(peer: Any, name: str, **arguments: Any) -> float:
        asked.append((peer, name, arguments))
        return float(len(asked))

    monkeypatch.setattr(latency, "request", request)
    return asked


def test_rounds_are_compared_with_each_other(result: dict[str, Any]) -> None:
    beside = result["beside"]
    assert ratio_to(beside["alone"], beside["64"], "gaps") == pytest.approx(2.0)
    assert ratio_to(beside["alone"], beside["None"], "per_token") == pytest.approx(10.0)
    beside["64"].pop()
    with pytest.raises(ValueError, match="longer"):
        ratio_to(beside["alone"], beside["64"], "gaps")


def test_page_shows_medians_over_rounds(result: dict[str, Any]) -> None:
    lines = markdown(result).splitlines()
    for line in (
        "| 0.200 | 1.000 | 0.20 | 0.2 |",
        # The 99th percentile is a hundredth of the way to the longest of a hundred gaps.
        "| no texts | 20.0 | 1.00 | 20.8 | 1.00 | 1 |",
        "| not set | 300.0 | 10.00 | 312.0 | 10.00 | 5001 |",
        "| 64 | 40.0 | 2.00 | 41.6 | 2.00 | 2001 |",
        "| hardware | a CPU |",
    ):
        assert line in lines


def test_the_plot_is_of_the_same_figures(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Any, ...]] = []
    for name in ("plot", "annotate"):
        draw = getattr(Axes, name)

        def noted(self: Axes, *args: Any, draw: Any = draw, **options: Any) -> Any:
            drawn.append(args)
            return draw(self, *args, **options)

        monkeypatch.setattr(Axes, name, noted)
    plot(result["beside"], tmp_path / "latency.png")
    (across, up), *labels = drawn
    assert across == [5001.0, 2001.0]
    assert up == pytest.approx([10.0, 2.0])
    assert labels == [("not set", (across[0], up[0])), ("64", (across[1], up[1]))]
    assert (tmp_path / "latency.png").stat().st_size > 0


def test_the_engines_take_turns_at_the_question(requests: list[Request]) -> None:
    gem: Any = "gem"
    plain: Any = "plain"
    seconds = latency.ask(gem, plain, [[1], [2], [3]], [[7], [8], [9]])
    assert [(peer, name) for peer, name, _ in requests] == [
        *(("gem", "embed"), ("gem", "first_token"), ("plain", "first_token")),
        *(("plain", "first_token"), ("gem", "embed"), ("gem", "first_token")),
        *(("gem", "embed"), ("gem", "first_token"), ("plain", "first_token")),
    ]
    assert requests[1][2] == requests[2][2] == {"ids": [1, 7]}
    assert seconds == {"one engine": [6.0, 8.0], "two engines": [4.0, 9.0]}


def test_the_settings_take_turns_beside_texts(requests: list[Request]) -> None:
    gem: Any = "gem"
    found = latency.chat_beside(
        gem, {"prompts": [[1]], "texts": [[2]]}, rounds=2, caps=latency.CAPS
    )
    caps = [arguments["cap"] for _, _, arguments in requests[1:]]
    assert caps[:7] == [None, None, *latency.CAPS]
    assert caps[7:] == caps[:7][::-1]
    alone = [n for n, (*_, arguments) in enumerate(requests) if not arguments["with_texts"]]
    assert alone == [1, 14]
    assert {len(rounds) for rounds in found.values()} == {2}
