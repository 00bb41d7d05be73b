"""The endpoint benchmark's arithmetic, tables and command lines, without a server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from endpoint_client import bodies_of, has_text
from endpoint_report import markdown, ratios, ratios_by_round
from endpoint_servers import flags


@pytest.fixture
def result() -> dict[str, Any]:
    def side(*seconds: float, first_token: list[float] | None = None) -> dict[str, Any]:
        return {"seconds": list(seconds), "first_token": first_token or []}

    return {
        "overhead": {
            "embed": {
                "32": {"amount": 320, "serve": side(10.0, 20.0), "vllm": side(9.0, 18.0)},
            },
            "stream": {
                "256": {
                    "amount": 512,
                    "serve": side(8.0, 8.0, first_token=[2.0, 4.0]),
                    "vllm": side(8.0, 8.0, first_token=[1.0, 3.0]),
                },
            },
        },
        "swing": {
            "10": {"texts": 10, "completions": 90, "both": [5.0], "halves": [9.0]},
            "90": {"texts": 90, "completions": 10, "both": [5.0], "halves": [7.0]},
        },
        "about": {"embed": {"commit": "abc"}, "swing": {"commit": "def"}},
    }


def test_ratios_are_larger_where_serve_is_better(result: dict[str, Any]) -> None:
    assert ratios(result) == {
        "embeddings, 32 in flight": 0.9,
        "chat, streamed, 256 in flight": 1.0,
        "chat, streamed, 256 in flight, first token": 0.625,
        "swing 10/90": 1.8,
        "swing 90/10": 1.4,
        "swing, whole": 1.6,
    }


def test_servers_are_compared_within_a_round(result: dict[str, Any]) -> None:
    assert ratios_by_round(result)["embeddings, 32 in flight"] == [0.9, 0.9]
    result["overhead"]["embed"]["32"]["vllm"]["seconds"].pop()
    with pytest.raises(ValueError, match="argument 2"):
        ratios_by_round(result)


def test_page_shows_ratios_and_medians(result: dict[str, Any]) -> None:
    lines = markdown(result).splitlines()
    for line in (
        "| embeddings, 32 in flight | 0.90 | 0.90 to 0.90 | >= 0.9 |",
        "| swing, whole | 1.60 | 1.60 to 1.60 |  |",
        "| embeddings | 32 | 320 | 21.3 | 23.7 |  |  |",
        "| chat, streamed | 256 | 512 | 64.0 | 64.0 | 3.00 | 2.00 |",
        "| 10/90 | 10 | 90 | 5.0 | 9.0 |",
        "| commit | def |",
    ):
        assert line in lines


def test_a_result_may_have_some_parts_only(result: dict[str, Any]) -> None:
    del result["overhead"], result["about"]["embed"]
    assert list(ratios(result)) == ["swing 10/90", "swing 90/10", "swing, whole"]
    assert "vLLM" not in markdown(result)


def test_every_table_is_rectangular(result: dict[str, Any]) -> None:
    blocks = [block for block in markdown(result).split("\n\n") if block.startswith("|")]
    assert len(blocks) == 5
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_requests_have_answers_of_one_length() -> None:
    (embed,) = bodies_of("embed", ["a text"], "gem", 16)
    assert json.loads(embed)["input"] == "a text"
    (chat,) = map(json.loads, bodies_of("chat", ["a question"], "gem", 16))
    (stream,) = map(json.loads, bodies_of("stream", ["a question"], "gem", 16))
    assert (chat["max_tokens"], chat["ignore_eos"], chat["stream"]) == (16, True, False)
    assert stream == {**chat, "stream": True}


def test_the_first_text_of_a_stream_is_no_role_and_no_end() -> None:
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    assert not has_text(json.dumps(role).encode())
    assert has_text(b'{"choices": [{"delta": {"content": "Paris"}}]}\n')
    assert not has_text(b"[DONE]\n")


def test_options_as_vllm_s_command_line_has_them() -> None:
    options = {"max_model_len": 512, "enable_prefix_caching": False, "enforce_eager": True}
    assert flags(options) == [
        "--max-model-len",
        "512",
        "--no-enable-prefix-caching",
        "--enforce-eager",
    ]
