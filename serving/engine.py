"""One vLLM engine in a thread of its own, to which other threads hand rows.

The engine runs in the process that uses it, so that it ends when that process is killed, and takes
embedding and generation requests in the same steps. Requests are taken in by tokens, not by rows:
what is in flight fills a few steps of the engine, whatever the lengths of the texts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gem_vllm.errors import first_line
from gem_vllm.serving.errors import JobError, told_by_validation

STEPS_IN_FLIGHT = 4


class BadRow(ValueError):
    """The engine refuses a row; the message says why."""


@dataclass(frozen=True)
class Answer:
    """What the engine made of one request.

    Attributes:
        vector: float32 [d] of an embedding request.
        text: of a generation request.
        tokens: of the prompt, and generated.
    """

    vector: np.ndarray | None
    text: str | None
    tokens: int


@dataclass
class _Request:
    text: str
    prompt: list[int]
    params: Any
    future: Future[Answer]

    @property
    def weight(self) -> int:
        return len(self.prompt) + (getattr(self.params, "max_tokens", None) or 0)


class EngineThread:
    """A GEM checkpoint's engine.

    Args:
        model: folder of the checkpoint.
        options: of vLLM's `EngineArgs`.
        dimensions: leading numbers of an embedding; None for all.
        max_tokens: of an answer.
    """

    def __init__(
        self, model: Path, options: Mapping[str, Any], dimensions: int | None, max_tokens: int
    ) -> None:
        self._arguments = (model, dict(options))
        self._dimensions, self._max_tokens = dimensions, max_tokens
        self._requests: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._waiting: dict[str, _Request] = {}
        self._room, self._tokenizing = threading.Condition(), threading.Lock()
        self._tokens = 0
        self._failure: BaseException | None = None
        self._ready = threading.Event()
        # Threads of the engine's kernels belong to the thread that starts it: it runs there too.
        self._thread = threading.Thread(target=self._run, name="gem-engine", daemon=True)
        self._thread.start()
        self._ready.wait()
        self._raise_failure()

    def embed(self, texts: Sequence[str]) -> list[Future[Answer]]:
        """A future for each text; waits while the engine has enough to do.

        A future raises `BadRow` for a text that cannot be embedded, `JobError` when the engine
        has failed.
        """
        from vllm import PoolingParams

        params = PoolingParams(task="embed", dimensions=self._dimensions)
        return self._submit_all(texts, self._token_ids(texts), params)

    def generate(self, prompts: Sequence[str]) -> list[Future[Answer]]:
        """As `embed`: the answer to each prompt, by the chat template where there is one."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=self._max_tokens)
        if self._tokenizer.chat_template is None:
            return self._submit_all(prompts, self._token_ids(prompts), params)
        with self._tokenizing:
            chats = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    add_generation_prompt=True,
                    return_dict=True,
                )["input_ids"]
                for prompt in prompts
            ]
        return self._submit_all(prompts, chats, params)

    def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        # A fast tokenizer is one thread's at a time; it uses several itself.
        with self._tokenizing:
            return self._tokenizer(list(texts))["input_ids"] if texts else []

    def _submit_all(
        self, texts: Sequence[str], prompts: Sequence[list[int]], params: Any
    ) -> list[Future[Answer]]:
        return [
            self._submit(_Request(text, prompt, params, Future()))
            for text, prompt in zip(texts, prompts, strict=True)
        ]

    def _submit(self, request: _Request) -> Future[Answer]:
        with self._room:
            while (
                self._failure is None
                and self._tokens
                and (self._tokens + request.weight > self._limit)
            ):
                self._room.wait()
            self._raise_failure()
            self._tokens += request.weight
            # Under the lock: what is put before a failure is found there and told of it.
            self._requests.put(request)
        return request.future

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise JobError(f"the engine failed: {_reason(self._failure)}") from self._failure

    def _run(self) -> None:
        try:
            self._start()
        except BaseException as error:
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            self._serve()
        except BaseException as error:
            with self._room:
                self._failure = error
                self._room.notify_all()
            self._fail_waiting(error)
        finally:
            self._engine.engine_core.shutdown()

    def _start(self) -> None:
        from vllm import LLM

        model, options = self._arguments
        llm = LLM(str(model), disable_log_stats=True, **options)
        self._engine, self._tokenizer = llm.llm_engine, llm.get_tokenizer()
        budget = self._engine.vllm_config.scheduler_config.max_num_batched_tokens
        self._limit = STEPS_IN_FLIGHT * budget

    def _serve(self) -> None:
        added = 0
        while True:
            while not self._requests.empty() or not self._engine.has_unfinished_requests():
                self._add(f"{added}", self._requests.get())
                added += 1
            finished = [output for output in self._engine.step() if output.finished]
            # Once a step: whoever waits for room takes the interpreter from the engine.
            self._release(self._waiting[output.request_id] for output in finished)
            for output in finished:
                request = self._waiting[output.request_id]
                request.future.set_result(_answer(request, output))
                del self._waiting[output.request_id]

    def _add(self, name: str, request: _Request) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        params = request.params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        # With its text: a special token in that is refused, where one among token ids is meant.
        prompt: Any = {"prompt_token_ids": request.prompt, "prompt": request.text}
        # From here on it waits: whatever else is raised is the engine's failure, and told to it.
        self._waiting[name] = request
        try:
            self._engine.add_request(name, prompt, params)
        except (VLLMClientError, ValueError) as error:
            # As the server answers with 400: too long, empty, a reserved token.
            self._release([self._waiting.pop(name)])
            request.future.set_exception(BadRow(first_line(error)))

    def _release(self, requests: Iterable[_Request]) -> None:
        if weight := sum(request.weight for request in requests):
            with self._room:
                self._tokens -= weight
                self._room.notify_all()

    def _fail_waiting(self, error: BaseException) -> None:
        waiting = [*self._waiting.values()]
        while not self._requests.empty():
            waiting.append(self._requests.get())
        for request in waiting:
            request.future.set_exception(JobError(f"the engine failed: {_reason(error)}"))


def _reason(error: BaseException) -> str:
    """In one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return told_by_validation(lines) or (lines or [type(error).__name__])[0]


def _answer(request: _Request, output: Any) -> Answer:
    if hasattr(output.outputs, "data"):
        return Answer(output.outputs.data.float().numpy(), None, len(request.prompt))
    (completion,) = output.outputs
    return Answer(None, completion.text, len(request.prompt) + len(completion.token_ids))


def in_order(
    futures: Sequence[Future[Answer]], bad: Callable[[int, str], None]
) -> list[Answer | None]:
    """The answers to `futures`; None, and a call of ``bad`` with index and reason, for bad rows."""
    answers: list[Answer | None] = []
    for i, future in enumerate(futures):
        try:
            answers.append(future.result())
        except BadRow as error:
            bad(i, str(error))
            answers.append(None)
    return answers
