"""``"gem": {...}`` in requests: what a client may ask of special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError

from gem_vllm.config import SUPPORTED_ARCHITECTURES

OPTION = "gem"


def asked_for(holder: Mapping[str, Any], model_config: Any, *allowed: str) -> frozenset[str]:
    """Which of the allowed options are true in a request, or in a message of one.

    Args:
        holder: its fields.
        model_config: vLLM's, of the served model.
        allowed: names of options.

    Raises:
        VLLMValidationError: another option or value, or the model has no special tokens; answered
            with 400 over HTTP.
    """
    options = holder.get(OPTION)
    if options is None:
        return frozenset()
    if not isinstance(options, Mapping) or options.keys() - set(allowed):
        raise VLLMValidationError(
            f'"{OPTION}" is {options!r} here; it takes {", ".join(allowed)}, each true or false.'
        )
    for name, value in options.items():
        if not isinstance(value, bool):
            raise VLLMValidationError(f'"{name}" in "{OPTION}" is {value!r}; it is true or false.')
    wanted = frozenset(name for name, value in options.items() if value)
    if wanted and model_config.architecture not in SUPPORTED_ARCHITECTURES.values():
        raise VLLMValidationError(
            f'{model_config.model} has no GEM special tokens, so there is no "{OPTION}" for it. '
            "Serve a GEM checkpoint."
        )
    return wanted


def refuse_options_of(messages: Any) -> None:
    """Refuse options of messages that are not read: the prompt's token ids came with the request.

    Raises:
        VLLMValidationError: answered with 400 over HTTP.
    """
    if any(isinstance(message, Mapping) and message.get(OPTION) for message in messages):
        raise VLLMValidationError(
            f'"{OPTION}" in a message is not for a request that brings its prompt\'s token ids, in '
            "kv_transfer_params. Leave either out."
        )
