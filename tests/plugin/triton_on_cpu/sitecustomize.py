"""Triton's interpreter in the place of its compiler, so that vLLM's V2 runner runs on a CPU.

Python imports this first where its folder is in PYTHONPATH, and so in an engine's workers too: vLLM
looks for Triton when it is imported.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpreterBuilder

CPU = GPUTarget("cpu", 0, 1)


class Driver:
    """To vLLM one active driver means that Triton can be used."""

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return CPU


class Compiler:
    """What `torch.compile` wants to know of it, though it compiles for a CPU without Triton."""

    def __init__(self, target: GPUTarget) -> None:
        assert target == CPU

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return target == CPU

    def hash(self) -> str:
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> SimpleNamespace:
        return SimpleNamespace()


backends["cpu"] = SimpleNamespace(driver=Driver, compiler=Compiler)


def with_masks_of_bool(access: Callable[..., Any]) -> Callable[..., Any]:
    """Let `access` take a mask of any integers, as compiled kernels do."""
    signature = inspect.signature(access)

    @functools.wraps(access)
    def converted(*args: Any, **kwargs: Any) -> Any:
        mask = signature.bind(*args, **kwargs).arguments["mask"]
        mask.data = mask.data.astype(bool)
        return access(*args, **kwargs)

    return converted


for name in ("create_masked_load", "create_masked_store"):
    setattr(InterpreterBuilder, name, with_masks_of_bool(getattr(InterpreterBuilder, name)))
