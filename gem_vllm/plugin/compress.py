"""Compressed context: a message, or a prompt, that is read through its special tokens alone.

A chat message that has ``"gem": {"compress": true}`` is rendered with a run of special tokens at
its end. What comes behind, the answer included, sees the run and nothing before it; and as soon as
the run is computed the KV blocks before it are free for other requests. Everything before a run is
hidden, not this one message: instructions belong behind it.

The run is put into the message as text, so that it lands where the chat template puts the message's
end, and the prompt is passed on as token ids: in text that is not ours a special token is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer

from gem_vllm.config import GemConfig, special_token
from gem_vllm.plugin.request_options import OPTION, asked_for
from gem_vllm.plugin.validation import refuse_spelled

# In a prompt, between rendering and its token ids: how many runs were put in.
_RUNS = "_gem_runs"


def compress_prompt(engine_input: Any, gem_config: GemConfig) -> None:
    """Put a run behind a prompt that the renderer is through with.

    Raises:
        VLLMValidationError: the prompt is not token ids, or names a special token.
    """
    ids = engine_input.get("prompt_token_ids")
    if engine_input.get("type") != "token" or not ids:
        raise VLLMValidationError("Only text and token ids can be compressed.")
    if not set(gem_config.special_token_ids).isdisjoint(ids):
        raise VLLMValidationError(
            f"The prompt holds a reserved GEM token ({special_token(0)} ...). Take it out."
        )
    engine_input["prompt_token_ids"] = [*ids, *gem_config.appended_ids]
    engine_input.pop("prompt", None)


class GemHfRenderer(HfRenderer):
    """vLLM's renderer, with the runs that chat messages ask for; registered in its place."""

    def render_messages(self, messages: Any, params: Any) -> Any:
        """As vLLM's; messages may have ``gem``."""
        messages, runs = self._with_runs(messages)
        conversation, prompt = super().render_messages(messages, _as_text(params))
        return conversation, _noted(prompt, runs)

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """As vLLM's; messages may have ``gem``."""
        messages, runs = self._with_runs(messages)
        conversation, prompt = await super().render_messages_async(messages, _as_text(params))
        return conversation, _noted(prompt, runs)

    def _with_runs(self, messages: Sequence[Any]) -> tuple[Sequence[Any], int]:
        """The messages with runs at the ends of those that ask for one, and how many do."""
        marked = [
            isinstance(message, Mapping) and bool(asked_for(message, self.model_config, "compress"))
            for message in messages
        ]
        if not any(marked):
            return messages, 0
        gem_config = GemConfig.from_hf_config(self.model_config.hf_config)
        for message in messages:
            refuse_spelled(str(message), gem_config)
        run = "".join(special_token(i) for i in range(gem_config.k))
        return [
            _ending_with(message, run) if compress else message
            for message, compress in zip(messages, marked, strict=True)
        ], sum(marked)

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        return super()._process_tokens(self._as_token_ids(prompt), **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        return await super()._process_tokens_async(self._as_token_ids(prompt), **kwargs)

    def _as_token_ids(self, prompt: Any) -> Any:
        """A prompt with runs of ours: without its text, with the instruction before each run."""
        runs = prompt.get(_RUNS, 0)
        if not runs:
            return prompt
        gem_config = GemConfig.from_hf_config(self.model_config.hf_config)
        ids: list[int] = []
        found = 0
        for token_id in prompt["prompt_token_ids"]:
            if token_id == gem_config.special_token_ids[0]:
                ids += gem_config.instruction_ids
                found += 1
            ids.append(token_id)
        if found != runs:
            raise VLLMValidationError(
                f"{runs} messages are to be compressed, and the prompt has room for {found} of "
                "them: the chat template leaves a message out, or the prompt was cut."
            )
        kept = {key: prompt[key] for key in prompt if key not in ("prompt", _RUNS)}
        return {**kept, "prompt_token_ids": ids}


def _as_text(params: Any) -> Any:
    """Rendering parameters that give text, in which a special token is found that a user spelled.

    A request may ask its template for token ids, which would pass for a prompt of token ids.
    """
    kwargs = params.chat_template_kwargs or {}
    return replace(params, chat_template_kwargs={**kwargs, "tokenize": False})


def _noted(prompt: Any, runs: int) -> Any:
    if runs:
        prompt[_RUNS] = runs
    return prompt


def _ending_with(message: Mapping[str, Any], run: str) -> dict[str, Any]:
    """The message with ``run`` at the end of its text."""
    content = message.get("content")
    kept = {key: message[key] for key in message if key != OPTION}
    if isinstance(content, str) and content:
        return {**kept, "content": content + run}
    parts = [] if content is None or isinstance(content, str) else list(content)
    for i in reversed(range(len(parts))):
        if isinstance(parts[i], Mapping) and parts[i].get("text"):
            parts[i] = {**parts[i], "text": parts[i]["text"] + run}
            return {**kept, "content": parts}
    raise VLLMValidationError(
        'A message with "compress" has no text; there is nothing to compress.'
    )
