"""lm-eval on a vLLM engine in this process: MMLU and perplexity, from local files or by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gem_vllm.errors import GemError
from gem_vllm.evaluation.options import HUB
from gem_vllm.training.data import open_text, read_jsonl

MMLU_SHOTS = 5
MMLU_FIELDS = ("subject", "question", "choices", "answer")
MMLU_SPLITS = ("dev", "test")
# As lm-eval's own task of that name has them.
_MMLU_TASK: dict[str, Any] = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": MMLU_SHOTS,
    "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
    "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
# Of a continuation: what one engine request may be asked for beside the most likely token.
_Scored = tuple[float, bool]


class EngineLM(TemplateLM):
    """lm-eval's interface to a language model over `vllm.LLM`.

    Args:
        llm: of a base or of a GEM checkpoint.
    """

    def __init__(self, llm: Any) -> None:
        super().__init__()
        self._llm = llm
        self.tokenizer = llm.get_tokenizer()
        self._max_length = llm.llm_engine.model_config.max_model_len

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
        """Token ids of a text, as of a prompt."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[_Scored]:
        """Continuations of one token share a request per context, and its prefix's cache."""
        results: list[_Scored] = [(0.0, True)] * len(requests)
        single: dict[tuple[int, ...], list[int]] = {}
        longer: list[int] = []
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) == 1:
                # One more token is generated: it needs room.
                single.setdefault(tuple(context[1 - self._max_length :]), []).append(index)
            else:
                longer.append(index)
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


def mmlu_tasks(source: str) -> list[str | dict[str, Any]]:
    """lm-eval's tasks of MMLU: its own (source ``hub``), or from a folder of dev and test files.

    Raises GemError for a folder that does not hold them.
    """
    if source == HUB:
        return ["mmlu"]
    folder = Path(source)
    found = {split: _mmlu_rows(folder, split) for split in MMLU_SPLITS}
    subjects = sorted({row["subject"] for row in found["test"]})
    return [
        {
            **_MMLU_TASK,
            "task": f"mmlu_{subject}",
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "custom_dataset": _dataset_of(
                {
                    split: [row for row in rows if row["subject"] == subject]
                    for split, rows in found.items()
                }
            ),
        }
        for subject in subjects
    ]


def perplexity_tasks(source: str) -> list[str | dict[str, Any]]:
    """lm-eval's task ``wikitext``: its own (source ``hub``), or the same over a file of articles.

    A file is text of WikiText's form, also .gz: an article begins with a line `` = Title = ``.
    """
    if source == HUB:
        return ["wikitext"]
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    return [
        {
            "task": "wikitext",
            "custom_dataset": _dataset_of({"test": _articles(Path(source))}),
            "output_type": "loglikelihood_rolling",
            "test_split": "test",
            "doc_to_text": "",
            "doc_to_target": wikitext_detokenizer,
            "process_results": process_results,
            "metric_list": [
                {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
            ],
        }
    ]


def run_language_tasks(llm: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    """lm-eval's results of some tasks on an engine, as JSON-ready values."""
    results = simple_evaluate(
        EngineLM(llm), tasks=tasks, limit=limit, log_samples=False, bootstrap_iters=1000
    )
    return json.loads(json.dumps(results, default=str))


def macro_accuracy(results: dict[str, Any]) -> tuple[float, float]:
    """MMLU as the paper has it: the mean over subjects, and its standard error."""
    subjects = [
        value
        for name, value in results["results"].items()
        if name.startswith("mmlu_") and name not in results.get("groups", {})
    ]
    mean = math.fsum(value["acc,none"] for value in subjects) / len(subjects)
    errors = [value["acc_stderr,none"] for value in subjects]
    # Of a subject of one question there is none.
    known = [error for error in errors if error != "N/A"]
    return mean, math.sqrt(math.fsum(error**2 for error in known)) / len(subjects)


def _mmlu_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{split}*.jsonl*")) if folder.is_dir() else []
    if len(files) != 1:
        raise GemError(
            f"--mmlu {folder}: needs one file {split}*.jsonl(.gz), and holds {len(files)}; or "
            "name hub, for lm-eval's own"
        )
    rows = []
    for where, row in read_jsonl(files[0]):
        if not isinstance(row, dict) or not set(MMLU_FIELDS) <= row.keys():
            raise GemError(f"{where}: expected an object with {', '.join(MMLU_FIELDS)}")
        rows.append({field: row[field] for field in MMLU_FIELDS})
    return rows


def _articles(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise GemError(f"--perplexity {file} is not a file; or name hub, for lm-eval's own")
    try:
        with open_text(file) as lines:
            pages: list[list[str]] = []
            for line in lines:
                words = line.split()
                if len(words) > 2 and words[0] == words[-1] == "=" != words[1]:
                    pages.append([])
                if pages:
                    pages[-1].append(line)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise GemError(f"--perplexity {file} cannot be read: {error}") from error
    if not pages:
        raise GemError(
            f"--perplexity {file} holds no article; one begins with a line ' = Title = '"
        )
    return [{"page": "".join(page)} for page in pages]


def _dataset_of(rows: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    """What lm-eval calls for a task's data."""
    splits = datasets.DatasetDict({name: datasets.Dataset.from_list(r) for name, r in rows.items()})
    return lambda **kwargs: splits
