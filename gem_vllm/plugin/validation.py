"""What a request is refused for, before the engine sees it; answered with 400 over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers import TokenizeParams

from gem_vllm.config import GemConfig, special_token
from gem_vllm.errors import GemError
from gem_vllm.plugin.runs import check_runs, pad_runs


def bounded(tok_params: TokenizeParams, limit: int) -> TokenizeParams:
    """How texts to be embedded are cut: at their ends, as by a model that only pools.

    Args:
        tok_params: of a request.
        limit: the most tokens that a text may have.
    """
    if tok_params.pad_prompt_tokens is not None:
        _refuse_padding()
    most, cut = tok_params.max_total_tokens, tok_params.truncate_prompt_tokens
    return replace(
        tok_params,
        max_total_tokens=limit if most is None else min(most, limit),
        truncate_prompt_tokens=cut if cut is None else min(cut, limit),
        truncation_side=tok_params.truncation_side or "right",
    )


def bounded_kwargs(kwargs: Mapping[str, Any] | None, limit: int) -> dict[str, Any]:
    """As `bounded`, of a text that the engine tokenizes itself.

    Args:
        kwargs: ``tokenization_kwargs`` of a request.
        limit: the most tokens that a text may have.
    """
    given = {"truncation_side": "right", **(kwargs or {})}
    if given.get("pad_prompt_tokens") or given.get("padding") not in (None, False, "do_not_pad"):
        _refuse_padding()
    cut = given.get("truncate_prompt_tokens")
    if cut is not None:
        given["truncate_prompt_tokens"] = limit if cut < 0 else min(cut, limit)
    return given


def _refuse_padding() -> None:
    raise VLLMValidationError(
        '"padding" is not for texts to embed: the padding would be read as text. Leave it out.'
    )


def refuse_empty_text(prompt: Any) -> None:
    """Refuse a text of no characters, of which a tokenizer that adds BOS makes a prompt."""
    text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
    if text == "":
        raise VLLMValidationError("The input is empty. Send at least one character to embed.")


def refuse_spelled(text: Any, gem_config: GemConfig) -> None:
    """Refuse a text that spells a special token; anything else than a text is let pass."""
    for name in map(special_token, range(gem_config.k)):
        if isinstance(text, str) and name in text:
            raise VLLMValidationError(f"A text spells the reserved GEM token {name}. Take it out.")


def refuse_echo(engine_input: Any, gem_config: GemConfig) -> None:
    """Refuse to give back a prompt's text where special tokens, which have none, are in it."""
    if not set(gem_config.special_token_ids).isdisjoint(engine_input.get("prompt_token_ids") or ()):
        raise VLLMValidationError(
            '"echo" is not for a prompt with GEM special tokens. Leave it out.'
        )


def is_rendered(prompt: Any) -> bool:
    """Whether a prompt comes from a renderer, as it does by every way but the engine's own."""
    return isinstance(prompt, Mapping) and "type" in prompt


def is_from_text(prompt: Any) -> bool:
    """Whether a prompt that the renderer is through with is not token ids alone."""
    return isinstance(prompt, str) or (
        isinstance(prompt, Mapping) and prompt.get("prompt") is not None
    )


def check_prompt(
    prompt: Sequence[int],
    options: Any,
    gem_config: GemConfig,
    max_model_len: int,
    *,
    block_size: int,
    from_text: bool,
) -> int:
    """Refuse what would give special tokens a meaning that they do not have.

    Whole runs in a prompt of token ids are taken: what is behind one reads what is before it
    through its special tokens. Text is not: whoever wrote a text that is quoted in a prompt could
    hide with a run whatever is before.

    Args:
        prompt: token ids.
        options: how to answer it, vLLM's `SamplingParams` or the request that asks for them; None
            where it is embedded.
        gem_config: of the served checkpoint.
        max_model_len: the engine's limit, in tokens.
        block_size: of the KV cache.
        from_text: whether the prompt is a text that was tokenized.

    Returns:
        The prompt's length, in tokens, with what fills up KV blocks before its runs.

    Raises:
        VLLMValidationError: answered with 400 over HTTP.
    """
    special_ids, length = gem_config.special_token_ids, len(prompt)
    if not set(special_ids).isdisjoint(prompt):
        _check_runs(prompt, special_ids, from_text)
        for option in ("prompt_logprobs", "prompt_logprob_token_ids"):
            if getattr(options, option, None) is not None:
                raise VLLMValidationError(
                    f"{option} is not for a prompt with special tokens. Leave it unset."
                )
        length = len(pad_runs(prompt, special_ids, block_size))
        if options is not None and len(prompt) < length >= max_model_len:
            raise VLLMValidationError(
                f"The prompt has {length} tokens, of which {length - len(prompt)} fill up KV "
                f"blocks before its special tokens; the context is {max_model_len}. Shorten the "
                "prompt."
            )
    if not set(special_ids).isdisjoint(getattr(options, "trace_decode_token_ids", None) or ()):
        raise VLLMValidationError(
            "trace_decode_token_ids names GEM special tokens, which are never generated."
        )
    allowed = getattr(options, "allowed_token_ids", None)
    if allowed and set(special_ids).issuperset(allowed):
        raise VLLMValidationError(
            "allowed_token_ids names GEM special tokens only, which are never generated."
        )
    return length


def check_request(
    request: Any, gem_config: GemConfig, max_model_len: int, *, block_size: int, from_text: bool
) -> None:
    """`check_prompt`, and what only vLLM's `EngineCoreRequest` shows.

    Args:
        request: for the engine.
        gem_config, max_model_len, block_size, from_text: as `check_prompt` has them.

    Raises:
        VLLMValidationError: answered with 400 over HTTP.
    """
    prompt = request.prompt_token_ids or []
    length = check_prompt(
        prompt,
        request.sampling_params,
        gem_config,
        max_model_len,
        block_size=block_size,
        from_text=from_text,
    )
    special_ids, embeds = gem_config.special_token_ids, request.pooling_params is not None
    if request.resumable and not set(special_ids).isdisjoint(prompt):
        raise VLLMValidationError(
            "A prompt that is sent in parts cannot have special tokens. Send it as a whole."
        )
    if embeds and prompt and prompt[-1] in special_ids:
        raise VLLMValidationError(
            "The prompt ends with special tokens; the server adds those that an embedding is made "
            "of itself. Take them out."
        )
    limit = gem_config.max_text_tokens(max_model_len)
    if embeds and length > limit:
        raise VLLMValidationError(
            f"The prompt has {length} tokens; an embedding request may have {limit}, the context "
            f"of {max_model_len} less {len(gem_config.appended_ids)} for the GEM special tokens "
            "and one that is kept free. Shorten the input or set truncate_prompt_tokens."
        )


def _check_runs(prompt: Sequence[int], special_ids: tuple[int, ...], from_text: bool) -> None:
    if from_text:
        position, token_id = next(
            (position, token_id)
            for position, token_id in enumerate(prompt)
            if token_id in special_ids
        )
        raise VLLMValidationError(
            f"The prompt's text spells the reserved GEM token "
            f"{special_token(special_ids.index(token_id))} (token {position}). Take it out. (The "
            "server adds these tokens to embedding requests itself.)"
        )
    try:
        check_runs(prompt, special_ids)
    except GemError as error:
        raise VLLMValidationError(f"{error}.") from error
