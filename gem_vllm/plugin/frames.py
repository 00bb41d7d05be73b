"""Room for Python's own stack during a step.

CPython 3.11 and later keep the frames of Python functions in chunks of 16 KiB, taken from the
operating system when a call does not fit and given back when that call returns. Where a chunk ends
between two frames of a loop (a compiled graph that calls one operator after another), every call
of the loop maps and unmaps one: a page fault and a flush of all cores' address translations,
hundreds of times in a step of a small model. Whether that happens is a matter of how deep the
engine happens to call at that point.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# A frame of more than 128 KiB is given a chunk of 256 KiB, and the rest of it is for what it calls.
_SLOTS = 16_400


def with_room(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``function(*args, **kwargs)``, with its frames and those below in one chunk."""
    return function(*args, **kwargs)


with_room.__code__ = with_room.__code__.replace(co_stacksize=_SLOTS)
