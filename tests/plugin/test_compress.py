"""Chat messages that are read through special tokens: what is rendered, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import running_engine

K = 4
INSTRUCTION = (70, 71)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
COMPRESS = {"gem": {"compress": True}}
BOOK = "A library keeps books, maps and newspapers, and lends most of them to its readers. " * 3
RUN = "".join(f"<|gem_{i}|>" for i in range(K))


@pytest.fixture(scope="module")
def folder(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", k=K, instruction_ids=INSTRUCTION)


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceEmbedder:
    return ReferenceEmbedder(folder)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with running_engine(folder, max_model_len=512) as engine:
        yield engine


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def expected_ids(reference: ReferenceEmbedder, messages: list[dict[str, Any]]) -> list[int]:
    """The chat template over messages that spell the runs, with the instruction before each."""
    tokenizer = reference.tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    first = reference.gem_config.special_token_ids[0]
    return [part for i in ids for part in ((*INSTRUCTION, i) if i == first else (i,))]


@pytest.mark.parametrize(
    ("messages", "spelled"),
    [
        (
            [user(BOOK, **COMPRESS), user("What is lent?")],
            [user(BOOK + RUN), user("What is lent?")],
        ),
        (
            [
                user(BOOK, **COMPRESS),
                user("And?", **COMPRESS),
                user("So?", gem={"compress": False}),
            ],
            [user(BOOK + RUN), user("And?" + RUN), user("So?")],
        ),
        ([user([{"type": "text", "text": BOOK}], **COMPRESS)], [user(BOOK + RUN)]),
    ],
    ids=["one", "chained", "parts"],
)
def test_a_message_is_read_through_its_run(
    messages: list[Any], spelled: list[Any], llm: LLM, reference: ReferenceEmbedder
) -> None:
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    ids = expected_ids(reference, spelled)
    assert output.prompt_token_ids == ids
    found = list(output.outputs[0].token_ids)
    wanted = reference.generate(ids, 8)
    assert found[: len(wanted)] == wanted
    assert "gem" in messages[0], "the caller's messages are left as they are"


def test_a_message_that_is_not_to_be_compressed_is_as_ever(llm: LLM) -> None:
    asked, plain = (
        llm.chat([user(BOOK, **more)], GREEDY, use_tqdm=False)[0]
        for more in ({"gem": {"compress": False}}, {})
    )
    assert asked.prompt_token_ids == plain.prompt_token_ids
    assert asked.outputs[0].token_ids == plain.outputs[0].token_ids


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (user(BOOK, gem=True), "takes compress, each true or false"),
        (user(BOOK, gem={"compress": 1}), "is 1; it is true or false"),
        (user(BOOK, gem={"shrink": True}), "takes compress"),
        (user("", **COMPRESS), "nothing to compress"),
        (user(f"{BOOK} {RUN}", **COMPRESS), r"spells the reserved GEM token <\|gem_0\|>"),
        (user([{"type": "text", "text": "<|gem_2|>"}], **COMPRESS), "spells the reserved"),
        (user(BOOK + RUN), "spells the reserved GEM token"),
    ],
)
def test_what_cannot_be_compressed_is_refused(message: Any, error: str, llm: LLM) -> None:
    with pytest.raises(VLLMValidationError, match=error):
        llm.chat([message], GREEDY, use_tqdm=False)
    with pytest.raises(VLLMValidationError, match="spells the reserved GEM token"):
        llm.chat([user("<|gem_1|>"), user(BOOK, **COMPRESS)], GREEDY, use_tqdm=False)


def test_a_template_that_leaves_the_message_out_is_named(llm: LLM) -> None:
    template = "{% for m in messages[1:] %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(VLLMValidationError, match="leaves a message out"):
        llm.chat(
            [user(BOOK, **COMPRESS), user("What?")], GREEDY, chat_template=template, use_tqdm=False
        )


def test_a_model_without_special_tokens_is_refused(tiny_base: Callable[..., Path]) -> None:
    with (
        running_engine(tiny_base("llama"), max_model_len=128) as llm,
        pytest.raises(VLLMValidationError, match="no GEM special tokens"),
    ):
        llm.chat([user("Bread", **COMPRESS)], GREEDY, use_tqdm=False)
