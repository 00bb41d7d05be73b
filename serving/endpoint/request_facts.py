"""What is read out of a request: its task, how much it asks for, and where it belongs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

EMBED, GENERATE, OTHER = "embed", "generate", "other"
_TASKS = {
    EMBED: {
        "/v1/embeddings",
        "/v2/embed",
        "/pooling",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    },
    GENERATE: {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/inference/v1/generate",
        "/generative_scoring",
        "/v1/systemone",
        "/cohere/v2/chat",
    },
}
# Texts that are alike for so long are taken for the same.
ROUTING_CHARACTERS = 8192
# A shorter text is computed sooner than it is looked for; it may not even fill a KV block.
MIN_ROUTING_CHARACTERS = 256
# Fields that hold what a request is about, the first that is there.
_CONTENT = ("messages", "prompt", "input", "texts", "documents")
# Fields that may hold several inputs.
_LISTS = (
    *("messages", "input", "prompt", "texts", "inputs", "documents"),
    *("text_2", "data_2", "queries", "items"),
)
# Of them, those in which a list of messages is one input.
_CONVERSATIONS = ("messages", "input")


def task_of(path: str) -> str:
    """What a request for ``path`` is: `EMBED`, `GENERATE` or `OTHER`."""
    return next((task for task, paths in _TASKS.items() if path in paths), OTHER)


def parse_body(body: bytes) -> dict[str, Any] | None:
    """The JSON object in a body; None where there is none, which vLLM answers.

    What is nested too deeply to be read is none.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def count_inputs(body: Mapping[str, Any]) -> int:
    """Texts, prompts, documents or conversations of a request; of a list of token ids, one."""
    return max((_length(name, body[name]) for name in _LISTS if name in body), default=1)


def _length(name: str, value: Any) -> int:
    if not isinstance(value, list) or not value or isinstance(value[0], int):
        return 1
    if name in _CONVERSATIONS and isinstance(value[0], Mapping):
        return 1
    return len(value)


def routing_text(body: Mapping[str, Any]) -> str | None:
    """The text of a request whose prefix another request may share.

    The text of an embedding request and the same text as a prompt, or in the first message of a
    chat, give the same: they go to the same replica. None for token ids, for several texts, for
    what is nested too deeply and for what is shorter than `MIN_ROUTING_CHARACTERS`: those are
    better spread.
    """
    name = next((name for name in _CONTENT if name in body), None)
    try:
        text = "" if name is None else _text(body[name])
    except RecursionError:
        return None
    return text[:ROUTING_CHARACTERS] if len(text) >= MIN_ROUTING_CHARACTERS else None


def _text(value: Any) -> str:
    """The text of a prompt, or of messages: their contents, one after the other."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _text(value.get("content", value.get("text")))
    if not isinstance(value, Sequence) or not value:
        return ""
    if isinstance(value[0], Mapping):
        return "".join(map(_text, value))
    return _text(value[0]) if len(value) == 1 else ""
