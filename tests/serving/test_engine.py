"""What a failing engine does to the requests that it has, with a stand-in for vLLM's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gem_vllm.serving.engine import BadRow, EngineThread
from gem_vllm.serving.errors import JobError


class BrokenEngine:
    """Raises for every request, or takes it and has an answer that is none."""

    engine_core = SimpleNamespace(shutdown=lambda: None)

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self._names: list[str] = []

    def has_unfinished_requests(self) -> bool:
        return bool(self._names)

    def add_request(self, name: str, *_: Any) -> None:
        if self._error is not None:
            raise self._error
        self._names.append(name)

    def step(self) -> list[Any]:
        return [SimpleNamespace(request_id=name, finished=True) for name in self._names]


class WithBrokenEngine(EngineThread):
    """An engine thread around a `BrokenEngine`."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        super().__init__(Path("model"), {}, None, 1)

    def _start(self) -> None:
        self._engine: Any = BrokenEngine(self._error)
        self._tokenizer: Any = lambda texts: {"input_ids": [[1]] * len(texts)}
        self._limit = 10


@pytest.mark.parametrize(
    ("error", "told", "message"),
    [
        (ValueError("too long\nby far"), BadRow, "^too long$"),
        (RuntimeError("no memory"), JobError, "the engine failed: no memory"),
        (None, JobError, "the engine failed: .* no attribute 'outputs'"),
    ],
)
def test_a_request_that_gets_no_answer_is_told_so(
    error: Exception | None, told: type[Exception], message: str
) -> None:
    (future,) = WithBrokenEngine(error).embed(["a river"])
    with pytest.raises(told, match=message):
        future.result(timeout=120)


def outcome(call: Callable[[], Any]) -> Any:
    """What a call that may wait for ever gives or raises."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result(timeout=120)


def test_rows_that_are_refused_give_their_room_back() -> None:
    """Three times as many as there is room for."""
    engine = WithBrokenEngine(ValueError("too long"))
    futures = outcome(lambda: engine.embed(["a river"] * 30))
    assert len(futures) == 30
    for future in futures:
        with pytest.raises(BadRow, match=r"^too long$"):
            future.result(timeout=120)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), None])
def test_who_waits_for_room_is_told_of_a_failure(error: Exception | None) -> None:
    engine = WithBrokenEngine(error)
    with pytest.raises(JobError, match=r"^the engine failed: "):
        outcome(lambda: engine.embed(["a river"] * 30))
