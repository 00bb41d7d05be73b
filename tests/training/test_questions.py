"""`gem-vllm questions`: what a base writes about passages, kept part by part."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_vllm.errors import GemError
from gem_vllm.training import questions as module
from gem_vllm.training.question_forms import FORMS
from gem_vllm.training.questions import QuestionOptions, _Writer, write_questions

ENGINE = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 27}
NAMES = ("river", "bread", "moon", "library", "garden")


class FakeWriter:
    """Asks for a passage's first word; of the other form it comes to no end."""

    begun = 0
    calls: ClassVar[list[list[str]]] = []
    fail_at: str | None = None

    def __init__(self, options: QuestionOptions) -> None:
        FakeWriter.begun += 1

    def questions(self, texts: Sequence[str]) -> list[list[str | None]]:
        if self.fail_at in [text.split()[0] for text in texts]:
            raise KeyboardInterrupt
        self.calls.append(list(texts))
        return [[f"what is a {text.split()[0]}" for text in texts], [None for _ in texts]]

    def close(self) -> None:
        FakeWriter.begun -= 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWriter]:
    monkeypatch.setattr(module, "_Writer", FakeWriter)
    monkeypatch.setattr(module, "TEXTS_AT_ONCE", 2)
    monkeypatch.setattr(FakeWriter, "calls", [])
    monkeypatch.setattr(FakeWriter, "fail_at", None)
    return FakeWriter


@pytest.fixture
def options(tiny_base: Callable[..., Path], tmp_path: Path) -> QuestionOptions:
    data = tmp_path / "passages.jsonl"
    rows = [{"body": f"{name}\n\n is what {name} says."} for name in NAMES]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return QuestionOptions(
        base=tiny_base("llama", max_position_embeddings=1024),
        data=str(data),
        text_field="body",
        out=tmp_path / "new" / "questions.jsonl.gz",
        engine=ENGINE,
    )


def test_pairs_are_written_for_training(
    options: QuestionOptions, fake: type[FakeWriter], tmp_path: Path
) -> None:
    seen: list[int] = []
    assert write_questions(options, seen.append) == (2 * len(NAMES), len(NAMES))
    assert seen == [2, 4, 5]
    rows = [json.loads(line) for line in gzip.decompress(options.out.read_bytes()).splitlines()]
    assert rows == [
        {"anchor": f"what is a {name}", "positive": f"{name} is what {name} says."}
        for name in NAMES
    ]
    assert fake.begun == 0
    assert [path.name for path in options.out.parent.iterdir()] == [options.out.name]


def test_an_interrupted_run_goes_on(
    options: QuestionOptions, fake: type[FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fail_at", "moon")
    with pytest.raises(KeyboardInterrupt):
        write_questions(options, lambda done: None)
    assert fake.begun == 0
    assert not options.out.exists()
    with pytest.raises(GemError, match="differs in texts; remove it, or choose another --out"):
        write_questions(replace(options, texts=3), lambda done: None)
    monkeypatch.setattr(fake, "fail_at", None)
    assert write_questions(options, lambda done: None) == (10, 5)
    assert [len(call) for call in fake.calls] == [2, 2, 1]


def test_the_first_texts_alone(options: QuestionOptions, fake: type[FakeWriter]) -> None:
    assert write_questions(replace(options, texts=3), lambda done: None) == (6, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": Path("nowhere")}, "nowhere is no model folder"),
        ({"out": Path("questions.txt")}, "name a .jsonl"),
        ({"texts": 0}, "--texts must be at least 1"),
        ({"data": f"{'d' * 300}.txt"}, "does not exist"),
        ({"engine": {"max_modellen": 5}}, "--engine cannot set max_modellen"),
        ({"data": "missing.txt"}, "missing.txt does not exist"),
        ({"text_field": "text"}, "choose one by --text-field"),
    ],
)
def test_what_cannot_be_asked_about(
    options: QuestionOptions, fake: type[FakeWriter], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(GemError, match=message):
        write_questions(replace(options, **change), lambda done: None)
    assert not fake.calls


def make_out(options: QuestionOptions) -> None:
    options.out.parent.mkdir()
    options.out.write_text("mine")


def make_out_a_folder(options: QuestionOptions) -> None:
    options.out.mkdir(parents=True)


def make_parent_a_file(options: QuestionOptions) -> None:
    options.out.parent.touch()


def make_parts_a_file(options: QuestionOptions) -> None:
    options.out.parent.mkdir()
    options.parts_folder.touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_out, "is there already; remove it, or choose another --out"),
        (make_out_a_folder, "is there already; remove it, or choose another --out"),
        (make_parent_a_file, "nothing can be written in"),
        (make_parts_a_file, "questions.jsonl.gz.parts holds something else"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_asked(
    options: QuestionOptions,
    fake: type[FakeWriter],
    make: Callable[[QuestionOptions], None],
    message: str,
) -> None:
    make(options)
    with pytest.raises(GemError, match=message):
        write_questions(options, lambda done: None)
    assert not fake.calls


def test_questions_are_not_written_into_the_base(
    options: QuestionOptions, fake: type[FakeWriter]
) -> None:
    inside = replace(options, out=options.base / "questions.jsonl")
    with pytest.raises(GemError, match=f"--out .* is in {options.base}, which is read"):
        write_questions(inside, lambda done: None)
    assert not inside.parts_folder.exists()


def test_a_folder_of_something_else_is_left_alone(
    options: QuestionOptions, fake: type[FakeWriter]
) -> None:
    (options.parts_folder).mkdir(parents=True)
    (options.parts_folder / "mine.txt").touch()
    with pytest.raises(GemError, match="holds something else"):
        write_questions(options, lambda done: None)


def test_what_is_no_question_is_an_error(
    options: QuestionOptions, fake: type[FakeWriter], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "questions", lambda self, texts: [[None for _ in texts]] * 2)
    with pytest.raises(GemError, match="of 10 questions none leads back to its passage"):
        write_questions(options, lambda done: None)
    assert not options.out.exists()


def test_a_base_with_too_short_a_context_is_refused(
    options: QuestionOptions, tiny_base: Callable[..., Path]
) -> None:
    short = replace(options, base=tiny_base("llama", max_position_embeddings=512))
    with pytest.raises(GemError, match="a context of 512 tokens; examples, passage and question"):
        write_questions(short, lambda done: None)


def test_the_engine_writes_as_the_model_does(
    options: QuestionOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily, up to its end, behind the examples and the passage."""
    # In this process, as `tests/plugin/conftest.py` has it, whatever other tests are collected.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # A random model ends no line; this it does write, if not of every passage.
    monkeypatch.setattr(module, "QUESTION_END", "it")
    writer = _Writer(options)
    try:
        texts = [f"The {name} is near." for name in NAMES]
        written = writer.questions(texts)
    finally:
        writer.close()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    model = AutoModelForCausalLM.from_pretrained(options.base)
    for form, found in zip(FORMS, written, strict=True):
        for text, question in zip(texts, found, strict=True):
            prompt = tokenizer(f"{form.shown}Passage: {text}\n{form.name}:", return_tensors="pt")
            output = model.generate(
                **prompt, do_sample=False, max_new_tokens=module.MAX_QUESTION_TOKENS
            )
            new = output[0, prompt.input_ids.shape[1] :]
            line, end, _ = tokenizer.decode(new, skip_special_tokens=True).partition("it")
            ended = end or new[-1] == tokenizer.eos_token_id
            assert question == (line.strip() if ended else None)
    questions = [question for found in written for question in found]
    assert any(questions)
