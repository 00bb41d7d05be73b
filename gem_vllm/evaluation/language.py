"""lm-eval on a vLLM engine in this process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gem_vllm.training.sequences import plain_prompt_template

# Of a continuation: its log-likelihood, and whether greedy decoding gives it.
_Scored = tuple[float, bool]


class EngineLM(TemplateLM):
    """lm-eval's interface to a language model over `vllm.LLM`.

    Args:
        llm: of a base or of a GEM checkpoint.

    Attributes:
        cut_contexts: how many different contexts lost their start, for want of room.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self._llm = llm
        self.tokenizer = llm.get_tokenizer()
        self._head = list(plain_prompt_template(self.tokenizer).head)
        self._max_length = llm.llm_engine.model_config.max_model_len
        self.cut_contexts = 0

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text, as of the beginning of a prompt.

        Without what a tokenizer may put behind a prompt (an EOS): the text goes on.
        """
        content = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        return content if add_special_tokens is False else self._head + content

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[_Scored]:
        """Continuations of one token share a request per context, and its prefix's cache."""
        results: list[_Scored] = [(0.0, True)] * len(requests)
        single: dict[tuple[int, ...], list[int]] = {}
        longer: list[int] = []
        cut: set[tuple[int, ...]] = set()
        for index, (_, context, continuation) in enumerate(requests):
            length = len(context)
            if len(continuation) == 1:
                # One more token is generated: it needs room.
                single.setdefault(tuple(context[1 - self._max_length :]), []).append(index)
            else:
                longer.append(index)
                length += len(continuation)
            if length >= self._max_length:
                cut.add(tuple(context))
        self.cut_contexts += len(cut)
        for index, scored in self._score_choices(single, [request[2] for request in requests]):
            results[index] = scored
        rows = [(requests[index][1], requests[index][2]) for index in longer]
        for index, scored in zip(longer, self._score_rows(rows), strict=True):
            results[index] = scored
        return results

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the engine's length without overlap."""
        rows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 2,
                context_len=1,
            )
            for window in windows:
                rows.append(make_disjoint_window(window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._score_rows(rows), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to each request's own stop strings."""
        from vllm import SamplingParams

        prompts, params = [], []
        for context, options in (request.args for request in requests):
            most = options.get("max_gen_toks", 256)
            prompts.append(_prompt(self.tok_encode(context)[most - self._max_length :]))
            params.append(
                SamplingParams(
                    temperature=options.get("temperature", 0.0),
                    max_tokens=most,
                    stop=options.get("until"),
                )
            )
        outputs = self._llm.generate(prompts, params, use_tqdm=not disable_tqdm)
        return [output.outputs[0].text for output in outputs]

    def _score_choices(
        self, contexts: dict[tuple[int, ...], list[int]], continuations: list[list[int]]
    ) -> list[tuple[int, _Scored]]:
        """Of each context, the log-probabilities of some next tokens."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=sorted({continuations[index][0] for index in indices}),
            )
            for indices in contexts.values()
        ]
        prompts = [_prompt(context) for context in contexts]
        outputs = self._llm.generate(prompts, params, use_tqdm=bool(prompts)) if prompts else []
        scored = []
        for output, indices in zip(outputs, contexts.values(), strict=True):
            (answer,) = output.outputs
            for index in indices:
                token = continuations[index][0]
                value = answer.logprobs[0][token].logprob
                scored.append((index, (value, token == answer.token_ids[0])))
        return scored

    def _score_rows(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[_Scored]:
        """Log-likelihood of each continuation behind its context, of all its tokens."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1)
        # Of a context that is too long the end is kept; one more token is generated.
        prompts = [
            [*context, *continuation][1 - self._max_length :] for context, continuation in rows
        ]
        outputs = (
            self._llm.generate([_prompt(ids) for ids in prompts], params, use_tqdm=True)
            if rows
            else []
        )
        scored = []
        for output, ids, (_, continuation) in zip(outputs, prompts, rows, strict=True):
            count = len(continuation)
            found = zip(ids[-count:], output.prompt_logprobs[-count:], strict=True)
            pairs = [
                (logprobs[token].logprob, logprobs[token].rank == 1) for token, logprobs in found
            ]
            scored.append((math.fsum(value for value, _ in pairs), all(best for _, best in pairs)))
        return scored


def _prompt(token_ids: Sequence[int]) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


def load_named(tasks: list[str | dict[str, Any]]) -> None:
    """Load the data of lm-eval's own tasks among some, which may be on the hub."""
    if named := [task for task in tasks if isinstance(task, str)]:
        TaskManager().load(named)


def run_language_tasks(
    llm: Any, tasks: list[Any], limit: int | None, shots: int | None
) -> dict[str, Any]:
    """lm-eval's results of some tasks on an engine, as JSON-ready values.

    Beside them, ``cut_contexts`` is `EngineLM`'s.

    Args:
        llm: as of `EngineLM`.
        tasks: names or configurations.
        limit: of documents of each task.
        shots: examples before each document; None for as many as a task itself has.
    """
    lm = EngineLM(llm)
    results = simple_evaluate(
        lm,
        tasks=tasks,
        # Reading the thousands of tasks that lm-eval has takes seconds.
        task_manager=TaskManager(include_defaults=any(isinstance(task, str) for task in tasks)),
        num_fewshot=shots,
        limit=limit,
        log_samples=False,
        bootstrap_iters=1000,
    )
    return json.loads(json.dumps({**results, "cut_contexts": lm.cut_contexts}, default=str))
