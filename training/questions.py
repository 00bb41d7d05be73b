"""Questions that a language model writes about passages: pairs for training, without labels.

The form is InPars' (arXiv 2202.05144): some examples, the passage, and the model goes on. It is the
base itself that writes, on vLLM; what is kept is what `round_trip` finds good.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from gem_vllm.errors import GemError
from gem_vllm.folders import content_sha256, read_json, refuse_inside, write_json
from gem_vllm.machine import (
    check_engine_options,
    engine_defaults,
    engine_workers,
    environment,
    serve_environment,
)
from gem_vllm.tokens import load_tokenizer
from gem_vllm.training.data import TextSource
from gem_vllm.training.pairs import check_pairs_file, write_pairs
from gem_vllm.training.question_forms import FORMS
from gem_vllm.training.round_trip import found_again
from gem_vllm.training.sequences import plain_prompt_template

MAX_PASSAGE_TOKENS = 320
MAX_QUESTION_TOKENS = 32
QUESTION_END = "\n"
TEXTS_AT_ONCE = 512
OPTIONS_FILE = "options.json"


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """Which model writes, about which texts.

    Attributes:
        base: folder of the model that writes: a base, or a GEM checkpoint.
        data: passages, as `TextSource` reads them.
        out: file to write, .jsonl or .jsonl.gz, for ``gem-vllm train --pairs``.
        text_field: of the passages, in JSON lines or a dataset.
        texts: at most so many passages, the first ones; None for all.
        engine: options of vLLM's engine.
    """

    base: Path
    data: str
    out: Path
    text_field: str = "text"
    texts: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def parts_folder(self) -> Path:
        """Where finished parts are kept until all are there: ``OUT.parts``."""
        return self.out.with_name(self.out.name + ".parts")

    def check(self) -> None:
        """Raise GemError for what cannot be begun."""
        if not (self.base / "config.json").is_file():
            raise GemError(f"--base {self.base} is no model folder: it has no config.json")
        check_pairs_file(self.out)
        refuse_inside(self.out, self.base)  # parts there would change its hash
        check_engine_options(self.engine)
        if self.texts is not None and self.texts < 1:
            raise GemError("--texts must be at least 1")
        TextSource(self.data, self.text_field).check()

    def bound(self) -> dict[str, Any]:
        """What the questions depend on: parts that are there count only where it is the same."""
        data = Path(self.data)
        return {
            "base": content_sha256(self.base),
            "data": content_sha256(data) if os.path.isfile(data) else self.data,
            "text_field": self.text_field,
            "texts": self.texts,
            "engine": self.engine,
        }


def write_questions(options: QuestionOptions, progress: Callable[[int], None]) -> tuple[int, int]:
    """Have a text of each form written about every passage, and write the pairs that are kept.

    A line is ``{"anchor": question, "positive": passage}``. For the model that writes, passages are
    cut at ``MAX_PASSAGE_TOKENS``. The same call goes on where an interrupted one ended.

    Args:
        options: checked here.
        progress: called with the number of passages that are done.

    Returns:
        The numbers of questions that were asked for, and kept.

    Raises:
        GemError: it cannot be begun, ``OUT.parts`` holds parts of something else, or no question
            is kept.
    """
    options.check()
    folder = options.parts_folder
    _bind(folder, options.bound())
    texts = _passages(options)
    writer: _Writer | None = None
    parts: list[Path] = []
    done = 0
    try:
        while some := list(islice(texts, TEXTS_AT_ONCE)):
            part = folder / f"{len(parts):06}.json"
            if not part.is_file():
                writer = writer or _Writer(options)
                write_json(part, {"texts": some, "questions": writer.questions(some)})
            parts.append(part)
            done += len(some)
            progress(done)
    finally:
        if writer is not None:
            writer.close()
    written = [
        (question, text)
        for part in map(read_json, parts)
        for of_form in part["questions"]
        for question, text in zip(of_form, part["texts"], strict=True)
    ]
    finished = [(question, text) for question, text in written if question]
    kept = [{"anchor": question, "positive": text} for question, text in found_again(finished)]
    if not kept:
        raise GemError(
            f"of {len(written)} questions none leads back to its passage; --base {options.base} "
            "may be too small to write any, or --data hold no prose"
        )
    write_pairs(options.out, kept)
    shutil.rmtree(folder)
    return len(written), len(kept)


def _passages(options: QuestionOptions) -> Iterator[str]:
    """Each on one line: the model ends a question by a line's end."""
    source = TextSource(options.data, options.text_field)
    return (" ".join(text.split()) for text in islice(source, options.texts))


class _Writer:
    """The model that writes, on vLLM, greedily."""

    def __init__(self, options: QuestionOptions) -> None:
        from vllm import LLM, SamplingParams

        self._tokenizer = load_tokenizer(options.base)
        self._forms = [
            (self._ids(f"{form.shown}Passage:"), self._ids(f"\n{form.name}:")) for form in FORMS
        ]
        self._start = plain_prompt_template(self._tokenizer).head  # BOS, where there is one
        longest = max(len(head) + len(tail) for head, tail in self._forms) + len(self._start)
        needed = longest + MAX_PASSAGE_TOKENS + MAX_QUESTION_TOKENS
        config = AutoConfig.from_pretrained(options.base).get_text_config()
        if config.max_position_embeddings < needed:
            raise GemError(
                f"--base {options.base} has a context of {config.max_position_embeddings} tokens; "
                f"examples, passage and question need {needed}"
            )
        self._params = SamplingParams(
            temperature=0.0, max_tokens=MAX_QUESTION_TOKENS, stop=[QUESTION_END]
        )
        with environment(serve_environment(engine_workers(options.engine))):
            self._llm = LLM(str(options.base), **(engine_defaults(needed) | options.engine))

    def questions(self, texts: Sequence[str]) -> list[list[str | None]]:
        """For each form, a question about each passage; None where it came to no end."""
        passages = [self._ids(f" {text}")[:MAX_PASSAGE_TOKENS] for text in texts]
        written = []
        for head, tail in self._forms:
            prompts = [
                {"prompt_token_ids": [*self._start, *head, *passage, *tail]} for passage in passages
            ]
            outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
            answers = [output.outputs[0] for output in outputs]
            written.append(
                [each.text.strip() if each.finish_reason == "stop" else None for each in answers]
            )
        return written

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def _bind(folder: Path, bound: dict[str, Any]) -> None:
    """Begin or go on in a folder of parts; GemError if it is of something else."""
    file = folder / OPTIONS_FILE
    if file.is_file():
        before = read_json(file)
        if differs := [name for name in bound if before.get(name) != bound[name]]:
            raise GemError(
                f"{folder} holds parts of a run that differs in {', '.join(differs)}; remove it, "
                "or choose another --out"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise GemError(f"{folder} holds something else; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, bound)
