"""What is read out of a request: its task, how much it asks for, and where it belongs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from gem_vllm.serving.endpoint.request_facts import (
    count_inputs,
    parse_body,
    routing_text,
    task_of,
)


@pytest.mark.parametrize(
    ("path", "task"),
    [
        ("/v1/embeddings", "embed"),
        ("/rerank", "embed"),
        ("/v1/chat/completions", "generate"),
        ("/v1/chat/completions/batch", "generate"),
        ("/v1/responses", "generate"),
        ("/generative_scoring", "generate"),
        ("/v1/systemone", "generate"),
        ("/v1/models", "other"),
        ("/v1/embeddings/x", "other"),
    ],
)
def test_the_task_is_the_routes(path: str, task: str) -> None:
    assert task_of(path) == task


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"input": "a text"}, 1),
        ({"input": ["a", "b", "c"]}, 3),
        ({"input": [1, 2, 3]}, 1),
        ({"input": [[1, 2], [3]]}, 2),
        ({"input": []}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"query": "q", "documents": ["a", "b", "c"]}, 3),
        ({"text_1": "a", "text_2": ["b", "c"]}, 2),
        ({"messages": [{"role": "user", "content": "a"}] * 9}, 1),
        ({"messages": [[{"role": "user", "content": "a"}]] * 9}, 9),
        ({"input": [{"role": "user", "content": "a"}, {"type": "function_call"}] * 9}, 1),
        ({"query": "q", "documents": [{"type": "text", "content": []}] * 9}, 9),
        ({}, 1),
    ],
)
def test_inputs_are_counted(body: dict[str, Any], count: int) -> None:
    assert count_inputs(body) == count


DOCUMENT = "A library keeps books and maps. " * 10


@pytest.mark.parametrize(
    "body",
    [
        {"input": DOCUMENT},
        {"input": [DOCUMENT]},
        {"prompt": DOCUMENT},
        {"messages": [{"role": "user", "content": DOCUMENT}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": DOCUMENT}]}]},
        {"input": [{"role": "user", "content": DOCUMENT}]},
        {"texts": [DOCUMENT]},
    ],
)
def test_a_text_has_one_place_whatever_is_asked_of_it(body: dict[str, Any]) -> None:
    assert routing_text(body) == DOCUMENT


def test_the_text_of_a_chat_begins_with_its_beginning() -> None:
    messages = [
        {"role": "system", "content": DOCUMENT},
        {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "Why?"}]},
        {"role": "assistant", "content": None},
    ]
    assert routing_text({"messages": messages}) == f"{DOCUMENT}Why?"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": [DOCUMENT, DOCUMENT]},
        {"input": [1, 2]},
        {"input": ""},
        {"input": DOCUMENT[:255]},
        {"input": 3},
        {"messages": None},
        {"messages": [[{"role": "user", "content": DOCUMENT}]] * 2},
        {"input": functools.reduce(lambda inner, _: [inner], range(5000), [DOCUMENT])},
    ],
)
def test_what_has_no_single_long_text_has_no_place(body: dict[str, Any]) -> None:
    assert routing_text(body) is None


def test_a_body_that_is_no_json_object_is_left_to_vllm() -> None:
    assert parse_body(b'{"a": 1}') == {"a": 1}
    deep = b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for body in (b"{torn", b"[1]", b"\xff", b'"a"', deep):
        assert parse_body(body) is None
