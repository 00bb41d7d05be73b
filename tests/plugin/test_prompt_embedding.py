"""A prompt's embedding with its answer: what of a request is read twice, and what ends a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from gem_vllm.plugin.prompt_embedding import DONE, _stream, copy_to_render


def test_a_request_is_rendered_twice() -> None:
    """The content of some messages is an iterator to pydantic; rendering takes token ids out."""
    parts = [{"type": "text", "text": "a river"}]
    request = ChatCompletionRequest.model_validate(
        {
            "messages": [
                {"role": "user", "content": "where?"},
                {"role": "assistant", "content": parts, "reasoning": None},
                {"role": "user", "content": parts},
            ],
            "kv_transfer_params": {"prompt_token_ids": [5, 6]},
        }
    )
    request.messages.append({"role": "user", "content": iter(parts)})
    for each in (copy_to_render(request), copy_to_render(request), request):
        contents = [message["content"] for message in each.messages]
        assert [list(content) for content in contents[1:]] == [parts] * 3
        assert contents[0] == "where?"
        assert each.kv_transfer_params.pop("prompt_token_ids") == [5, 6]


@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_ends_whatever_becomes_of_the_embedding(fails: bool) -> None:
    about = {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": "gem"}

    async def chunks() -> AsyncGenerator[str, None]:
        yield f"data: {json.dumps({**about, 'choices': [{'delta': {'content': 'a'}}]})}\n\n"
        yield f"{DONE}\n\n"

    async def embedding() -> list[list[float]]:
        if fails:
            raise ValueError("the queue is full")
        return [[1.0, 0.0]]

    def told(error: Exception) -> str:
        return json.dumps({"error": {"message": str(error)}})

    async def collect() -> list[str]:
        serving: Any = SimpleNamespace(create_streaming_error_response=told)
        found = asyncio.ensure_future(embedding())
        return [chunk async for chunk in _stream(serving, chunks(), found)]

    answer, last, done = asyncio.run(collect())
    assert "choices" in answer
    assert done == f"{DONE}\n\n"
    last = json.loads(last.removeprefix("data: "))
    if fails:
        assert last == {"error": {"message": "the queue is full"}}
    else:
        assert last == {**about, "choices": [], "gem": {"embeddings": [[1.0, 0.0]]}}
