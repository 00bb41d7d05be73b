"""Options that are JSON on the command line."""

from __future__ import annotations

import json
from typing import Any

from gem_vllm.errors import GemError


def json_object(text: str) -> dict[str, Any]:
    """The engine's options as `--engine` gives them; GemError if they are no JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise GemError(f"--engine is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise GemError('--engine is not a JSON object; give one such as {"max_model_len": 2048}')
    return value
