"""The embedding of a prompt, with its answer: ``"gem": {"embed": true}`` in a request.

The prompt goes to the engine twice, to be answered and to be embedded, and is computed once: the
two share its KV blocks in the prefix cache, in the same steps. What the embedding costs are the
special tokens and the prompt's last block, where that is not full.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from vllm import PoolingParams
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import VLLMValidationError

from gem_vllm.config import GemConfig
from gem_vllm.plugin.request_options import OPTION
from gem_vllm.plugin.validation import refuse_empty_text

Answer = Callable[[], Awaitable[Any]]
DONE = "data: [DONE]"


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
    prompts = getattr(request, "prompt", None)  # of a completion
    for prompt in prompts if isinstance(prompts, list) else [prompts]:
        refuse_empty_text(prompt)
    for engine_input in engine_inputs:
        prompt_ids = engine_input["prompt_token_ids"]
        if not 0 < len(prompt_ids) <= limit:
            raise VLLMValidationError(
                f"The prompt has {len(prompt_ids)} tokens; to be embedded, too, it may have 1 to "
                f"{limit}."
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
            return _stream(answered, embedding)
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
        if output.finished:
            return output.outputs.data.tolist()
    raise RuntimeError("the engine ended an embedding request without a result")


async def _stream(chunks: AsyncGenerator[str, None], embedding: Any) -> AsyncGenerator[str, None]:
    """The answer's chunks, and before the end one with the embeddings."""
    last = "data: {}"
    try:
        async for chunk in chunks:
            if not chunk.startswith(DONE):
                last = chunk
            elif "id" in (about := json.loads(last.removeprefix("data: "))):  # else an error
                about = {key: about[key] for key in ("id", "object", "created", "model")}
                gem = {OPTION: {"embeddings": await embedding}}
                yield f"data: {json.dumps({**about, 'choices': [], **gem})}\n\n"
            yield chunk
    finally:
        embedding.cancel()
        await chunks.aclose()
