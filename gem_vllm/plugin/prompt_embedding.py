"""The embedding of a prompt, with its answer: ``"gem": {"embed": true}`` in a request.

The prompt goes to the engine twice, to be answered and to be embedded, and is computed once: the
two share its KV blocks in the prefix cache, in the same steps. What the embedding costs are the
special tokens and the prompt's last block, where that is not full.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from vllm import PoolingParams
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError

from gem_vllm.config import GemConfig
from gem_vllm.plugin.request_options import OPTION
from gem_vllm.plugin.runs import pad_runs
from gem_vllm.plugin.validation import refuse_empty_text

Answer = Callable[[], Awaitable[Any]]
DONE = "data: [DONE]"


def copy_to_render(request: Any) -> Any:
    """A copy of a request, of which rendering may take what it takes: it is rendered again.

    What pydantic reads of a message's content may be an iterator, for one reading; it becomes a
    list here, in the request too.
    """
    for message in getattr(request, "messages", None) or ():
        content = message.get("content")
        if not isinstance(content, str | list | None):
            message["content"] = list(content)
    fields = {"kv_transfer_params"} & type(request).model_fields.keys()
    return request.model_copy(
        update={name: copy.deepcopy(getattr(request, name)) for name in fields}
    )


async def answer_with_embeddings(
    serving: Any, engine_inputs: list[Any], request: Any, raw_request: Any, answer: Answer
) -> Any:
    """What ``answer`` gives, with ``gem.embeddings``: float [prompts][d], of norm 1.

    Of a stream it is a chunk of its own, the last one.

    Args:
        serving: vLLM's `OpenAIServingChat` or `OpenAIServingCompletion`.
        engine_inputs: the request's prompts, rendered.
        request: the request.
        raw_request: with its headers; None where there are none.
        answer: vLLM's own way to answer it.

    Raises:
        VLLMValidationError: a prompt that cannot be embedded.
    """
    gem_config = GemConfig.from_hf_config(serving.model_config.hf_config)
    limit = gem_config.max_text_tokens(serving.model_config.max_model_len)
    block_size = serving.engine_client.vllm_config.cache_config.block_size
    prompts = getattr(request, "prompt", None)  # of a completion
    for prompt in prompts if isinstance(prompts, list) else [prompts]:
        refuse_empty_text(prompt)
    for engine_input in engine_inputs:
        prompt_ids = engine_input["prompt_token_ids"]
        length = len(pad_runs(prompt_ids, gem_config.special_token_ids, block_size))
        if not 0 < length <= limit:
            raise VLLMValidationError(
                f"The prompt has {length} tokens; to be embedded, too, it may have 1 to {limit}."
            )
        if prompt_ids[-1] in gem_config.special_token_ids:
            raise VLLMValidationError('"embed" does not go with a prompt that is compressed.')
    priority = serving._get_priority(request, raw_request)
    embedding = asyncio.gather(
        *(_embed(serving, each, request, priority, i) for i, each in enumerate(engine_inputs))
    )
    try:
        answered = await answer()
        if isinstance(answered, ErrorResponse):
            embedding.cancel()
            return answered
        if isinstance(answered, AsyncGenerator):
            return _stream(serving, answered, embedding)
        setattr(answered, OPTION, {"embeddings": await embedding})
        return answered
    except BaseException:
        embedding.cancel()
        raise


async def _embed(
    serving: Any, engine_input: Any, request: Any, priority: int, index: int
) -> list[float]:
    """The embedding of one prompt."""
    outputs = serving.engine_client.encode(
        engine_input,
        PoolingParams(task="embed"),
        f"gem-{request.request_id}-{index}",
        lora_request=serving._maybe_get_adapters(request),
        priority=priority,
    )
    async for output in outputs:
        if output.finished and output.outputs.data.numel():  # An aborted one has none.
            return output.outputs.data.tolist()
    raise RuntimeError("the engine ended an embedding request without a result")


async def _stream(
    serving: Any, chunks: AsyncGenerator[str, None], embedding: Any
) -> AsyncGenerator[str, None]:
    """The answer's chunks, and before the end one with the embeddings, or why there are none."""
    last = "data: {}"
    try:
        async for chunk in chunks:
            if not chunk.startswith(DONE):
                last = chunk
            elif "id" in (about := json.loads(last.removeprefix("data: "))):  # else an error
                about = {key: about[key] for key in ("id", "object", "created", "model")}
                try:
                    gem = {OPTION: {"embeddings": await embedding}}
                except Exception as error:  # As vLLM tells of any, in a stream that has begun.
                    told = serving.create_streaming_error_response(error)
                else:
                    told = json.dumps({**about, "choices": [], **gem})
                yield f"data: {told}\n\n"
            yield chunk
    finally:
        embedding.cancel()
        await chunks.aclose()
