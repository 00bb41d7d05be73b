"""An engine under lm-eval: the reference's log-likelihoods; and under mteb: which end is cut."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from gem_vllm.errors import GemError
from gem_vllm.evaluation.encoder import EngineEmbedder
from gem_vllm.evaluation.language import EngineLM, run_language_tasks
from gem_vllm.evaluation.language_tasks import (
    macro_accuracy,
    mmlu_shots,
    mmlu_tasks,
    perplexity_tasks,
)
from tests.evaluation.conftest import MMLU_ROWS, write_rows
from tests.plugin.conftest import running_engine
from tests.tiny import make_tiny_tokenizer

LENGTH = 64
PAIRS = [
    ("The capital of France is", " Paris"),
    ("What is the capital? Answer:", " A"),
    ("What is the capital? Answer:", " B"),
    ("", "Bread is made from flour"),
    ("In 1969 the first people walked on the moon. " * 6, " They came back"),
]


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., Path]) -> Path:
    return tiny_base("llama")


@pytest.fixture(scope="module")
def lm(tiny_checkpoint: Callable[..., Path]) -> Iterator[EngineLM]:
    with running_engine(tiny_checkpoint("llama"), max_model_len=LENGTH) as llm:
        yield EngineLM(llm)


def test_a_context_does_not_end_as_a_prompt_does() -> None:
    """With a tokenizer that puts an EOS behind every prompt, a continuation would follow that."""
    tokenizer = make_tiny_tokenizer(add_bos=True)
    plain = tokenizer("the capital", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", bos), ("<|end|>", eos)]
    )
    assert tokenizer("the capital")["input_ids"] == [bos, *plain, eos]
    config = SimpleNamespace(max_model_len=LENGTH)
    llm = SimpleNamespace(
        get_tokenizer=lambda: tokenizer, llm_engine=SimpleNamespace(model_config=config)
    )
    assert EngineLM(llm).tok_encode("the capital") == [bos, *plain]
    assert EngineLM(llm).tok_encode("the capital", add_special_tokens=False) == plain
    context, continuation = EngineLM(llm)._encode_pair("the capital", " is")
    assert (context, eos in continuation) == ([bos, *plain], False)


class Reference:
    """The base on transformers."""

    def __init__(self, base: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(base)

    @torch.inference_mode()
    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = [*context, *continuation][1 - LENGTH :]
        logprobs = self.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        rows = logprobs[-len(continuation) - 1 : -1]
        target = torch.tensor(continuation)
        value = float(rows.gather(1, target[:, None]).sum())
        return value, bool((rows.argmax(dim=-1) == target).all())


@pytest.fixture(scope="module")
def reference(base: Path) -> Reference:
    return Reference(base)


def instances(kind: str, rows: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, row, index) for index, row in enumerate(rows)]


def test_loglikelihoods_are_the_bases(lm: EngineLM, reference: Reference) -> None:
    found = lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        if context:
            ids = lm._encode_pair(context, continuation)
        else:
            ids = ([lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False))
        expected, best = reference.score(*ids)
        assert value == pytest.approx(expected, abs=1e-3)
        assert greedy == best


def test_a_greedy_continuation_is_known_as_such(lm: EngineLM, reference: Reference) -> None:
    prompt = "The quick brown fox"
    ids = reference.tokenizer(prompt, return_tensors="pt").input_ids
    greedy = reference.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    context, continuation = ids[0].tolist(), greedy[0, ids.shape[1] :].tolist()
    ((_, multi),) = lm._loglikelihood_tokens([(None, context, continuation)])
    ((_, single),) = lm._loglikelihood_tokens([(None, context, continuation[:1])])
    assert multi
    assert single


def test_rolling_windows_predict_every_token_once(lm: EngineLM, reference: Reference) -> None:
    text = "A library keeps books, maps and newspapers. " * 20
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 2 * LENGTH
    (found,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    window, expected, before = LENGTH - 2, 0.0, [lm.prefix_token_id]
    for start in range(0, len(ids), window):
        part = ids[start : start + window]
        # The last window has the tokens before it for context, as many as there is room for.
        room = window - len(part)
        context = ids[max(0, start - 1 - room) : start] if start else before
        expected += reference.score(context, part)[0]
    assert found == pytest.approx(expected, abs=1e-2)


def test_generation_is_greedy_and_stops_where_it_should(lm: EngineLM, reference: Reference) -> None:
    prompt = "The quick brown fox"
    ids = reference.tokenizer(prompt, return_tensors="pt").input_ids
    greedy = reference.model.generate(ids, max_new_tokens=8, do_sample=False)
    expected = reference.tokenizer.decode(greedy[0, ids.shape[1] :])
    stop = expected[-4:-2]
    rows = [(prompt, {"max_gen_toks": 8}), (prompt, {"max_gen_toks": 8, "until": [stop]})]
    whole, cut = lm.generate_until(instances("generate_until", rows), disable_tqdm=True)
    assert whole == expected
    assert cut == expected.partition(stop)[0]


def test_mmlu_and_perplexity_from_files(lm: EngineLM, mmlu_folder: Path, articles: Path) -> None:
    found = run_language_tasks(lm._llm, mmlu_tasks(str(mmlu_folder)), None, 5)
    assert found["n-samples"]["mmlu_anatomy"]["effective"] == 3
    assert mmlu_shots(found) == found["configs"]["mmlu_anatomy"]["num_fewshot"] == 5
    assert found["cut_contexts"] == 2 * MMLU_ROWS  # five questions are more than `LENGTH` tokens
    accuracy, error = macro_accuracy(found)
    subjects = [found["results"][f"mmlu_{name}"] for name in ("anatomy", "high_school_counting")]
    assert accuracy == pytest.approx(sum(subject["acc,none"] for subject in subjects) / 2)
    assert 0 <= error <= 1
    found = run_language_tasks(lm._llm, perplexity_tasks(str(articles)), None, None)
    assert found["n-samples"]["wikitext"]["effective"] == 2
    assert found["cut_contexts"] == 0
    assert found["results"]["wikitext"]["word_perplexity,none"] > 1


def test_the_macro_average_leaves_groups_out_and_takes_a_subject_of_one_question() -> None:
    results = {
        "results": {
            "mmlu_a": {"acc,none": 1.0, "acc_stderr,none": "N/A"},
            "mmlu_b": {"acc,none": 0.5, "acc_stderr,none": 0.2},
            "mmlu_stem": {"acc,none": 0.0, "acc_stderr,none": 0.9},
            "wikitext": {"word_perplexity,none": 3.0},
        },
        "groups": {"mmlu_stem": {}},
    }
    assert macro_accuracy(results) == pytest.approx((0.75, 0.1))


def test_a_long_text_is_embedded_from_its_start(lm: EngineLM) -> None:
    half = "A library keeps books, maps and newspapers. " * 20
    one, other, end = EngineEmbedder(lm._llm).embed([half, f"{half} {PAIRS[-1][0]}", PAIRS[-1][0]])
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert not np.allclose(one, end, atol=1e-2)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (4, {}, "dev has 4 rows of bread; 5 are shown"),
        (5, {"answer": 4}, "line 1: answer must be a choice's number, from 0 to 3"),
        (5, {"choices": ["yes", "no"]}, "line 1: choices must be a list of 4"),
        (5, {"choices": ["1", 2, "3", "4"]}, "line 1: question and choices must be texts"),
        (5, {"question": None}, "line 1: question and choices must be texts"),
    ],
)
def test_rows_that_are_not_mmlus_are_refused(
    rows: int, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    row = {"subject": "bread", "question": "?", "choices": ["1", "2", "3", "4"], "answer": 3}
    write_rows(tmp_path / "dev.jsonl", [{**row, **change}] * rows)
    write_rows(tmp_path / "test.jsonl", [row])
    with pytest.raises(GemError, match=message):
        mmlu_tasks(str(tmp_path))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GemError, match=r"needs one file dev\*"):
        mmlu_tasks(str(tmp_path))
    with pytest.raises(GemError, match="is not a file"):
        perplexity_tasks(str(tmp_path / "none"))
    (tmp_path / "plain.txt").write_text("no headings here\n")
    with pytest.raises(GemError, match="holds no article"):
        perplexity_tasks(str(tmp_path / "plain.txt"))
    packed = bytearray(gzip.compress(b" = Bread = \n\n Flour . \n" * 9))
    packed[14:18] = b"\xff" * 4
    (tmp_path / "broken.txt.gz").write_bytes(packed)
    with pytest.raises(GemError, match="cannot be read"):
        perplexity_tasks(str(tmp_path / "broken.txt.gz"))
