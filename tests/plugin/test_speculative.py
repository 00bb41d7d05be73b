"""Speculative decoding: tokens and embeddings are what they are without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.sample import rejection_sampler

from gem_vllm.config import GemConfig
from gem_vllm.plugin.drafter import Drafter
from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    drafted_and_accepted,
    named,
    random_prompts,
    run_together,
    running_engine,
)
from tests.plugin.mixed_load import MixedLoad, Tokens, greedy, tokens_of, with_runs
from tests.tiny import make_tiny_eagle_head

BY_NGRAMS = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 3,
}
OPTIONS: dict[str, Any] = {
    "max_model_len": 256,
    "max_num_batched_tokens": 96,
    "disable_log_stats": False,
}
SHAPES = [(5, 3), (31, 40), (47, 9, 33)]


def load_of(folder: Path) -> MixedLoad:
    """Chats of all kinds, some behind runs, and texts of all lengths, one with a run in it."""
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    behind_runs = [with_runs(special_ids, *shape, seed=10 + i) for i, shape in enumerate(SHAPES)]
    texts = [*random_prompts([1, 17, 64, 90], seed=1), behind_runs[0]]
    return MixedLoad.of(folder, [*random_prompts([3, 17, 60]), *behind_runs], texts, new=40)


def drafts_by(method: str, draft: Path, **options: Any) -> dict[str, Any]:
    return {"method": method, "model": str(draft), "num_speculative_tokens": 3, **options}


@pytest.mark.parametrize(
    "beside_chat",
    [
        pytest.param(None, id="any share"),
        pytest.param(24, id="a small share", marks=pytest.mark.slow),
    ],
)
def test_by_ngrams(
    beside_chat: int | None,
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In chunks, with runs inside prompts, beside texts to embed, and from the prefix cache."""
    # In a process of its own: the search brings numba, beside which no other engine starts.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    folder = tiny_checkpoint("llama", k=4)
    load = load_of(folder)
    options = {"gem_tokens_beside_chat": beside_chat} if beside_chat else {}
    with running_engine(
        folder, speculative_config=BY_NGRAMS, additional_config=options, **OPTIONS
    ) as llm:
        for _ in range(2):
            load.check(llm)
        assert drafted_and_accepted(llm)[1] > 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("draft_model", {}, id="draft_model"),
        pytest.param(
            "draft_model", {"enforce_eager": False}, id="compiled", marks=pytest.mark.slow
        ),
        pytest.param("eagle", {}, id="eagle"),
        pytest.param("eagle3", {}, id="eagle3"),
    ],
)
def test_by_a_draft(
    method: str,
    options: dict[str, Any],
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """In chunks, with runs inside prompts, beside texts to embed, and from the prefix cache."""
    folder, draft = tiny_checkpoint("llama", k=4), tiny_base("llama")
    if method != "draft_model":
        draft = make_tiny_eagle_head(method, tmp_path / method, draft)
    load = load_of(folder)
    with running_engine(
        folder, speculative_config=drafts_by(method, draft), **OPTIONS, **options
    ) as llm:
        for _ in range(2):
            load.check(llm)
        assert drafted_and_accepted(llm)[0] > 0


def test_every_token_of_the_base_is_accepted(
    tiny_checkpoint: Callable[..., Path], tiny_base: Callable[..., Path]
) -> None:
    """A chat's tokens are the base's: of what it drafts all is right, if it is given all.

    So its keys and values are there too behind a text that was embedded, in the prefix cache.
    """
    folder, base = tiny_checkpoint("llama", k=4), tiny_base("llama")
    texts = random_prompts([40, 90, 130], seed=2)
    load = MixedLoad.of(folder, random_prompts([3, 17, 60]), texts, new=41)
    follow_up = MixedLoad.of(folder, [[*text, 7, 8, 9] for text in texts], [], new=41)
    with running_engine(
        folder, speculative_config=drafts_by("draft_model", base), **OPTIONS
    ) as llm:
        load.check(llm)
        outputs = follow_up.check(llm)
        assert [outputs[f"chat-{i}"].num_cached_tokens for i in range(3)] == [32, 64, 128]
        drafted, accepted = drafted_and_accepted(llm)
        assert drafted == accepted == 6 * 30


@pytest.fixture
def sampling_is_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM's V1 runner takes what it finds in memory for a draft's temperature.

    Its shim for `rejection_sampler.expand_kernel` fills a copy and drops it (vLLM's issue 55005,
    still open, with any model); a tiny model's own tokens are refused then, more or fewer by
    chance. Here values are given to each of a request's tokens, as the kernel does on a GPU.
    """

    def expanded(
        values: torch.Tensor,
        cu_num_tokens: torch.Tensor,
        num_tokens: int,
        replace_from: int = 0,
        replace_to: int = 0,
    ) -> torch.Tensor:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(values == replace_from, replace_to, values)
        return values.repeat_interleave(counts, output_size=num_tokens)

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", expanded)


@pytest.mark.usefixtures("sampling_is_as_asked")
@pytest.mark.parametrize("sample_method", ["greedy", "probabilistic"])
def test_sampled_tokens(
    sample_method: str, tiny_checkpoint: Callable[..., Path], tiny_base: Callable[..., Path]
) -> None:
    """Compared by distributions, all tokens of the same model at one temperature are accepted."""
    folder, base = tiny_checkpoint("llama", k=4), tiny_base("llama")
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    drafts = drafts_by("draft_model", base, draft_sample_method=sample_method)
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=41, ignore_eos=True)
    requests = named("chat", random_prompts([3, 17, 60]), sampling) | named(
        "text", random_prompts([1, 64], seed=1), EMBED
    )
    with running_engine(folder, speculative_config=drafts, **OPTIONS) as llm:
        outputs = run_together(llm, requests)
        drafted, accepted = drafted_and_accepted(llm)
    assert drafted > 0
    assert accepted > 0
    assert accepted == drafted or sample_method == "greedy"
    tokens = tokens_of(outputs, 3)
    assert [len(of_chat) for of_chat in tokens] == [41] * 3
    sampled = {token for of_chat in tokens for token in of_chat}
    assert len(sampled) > 20
    assert sampled.isdisjoint(special_ids)


def test_a_head_is_given_every_row(
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden states of all tokens, of which without a head most are not computed to the end."""
    folder = tiny_checkpoint("llama", k=4)
    head = make_tiny_eagle_head("eagle", tmp_path / "eagle", tiny_base("llama"))
    given: list[torch.Tensor] = []
    original = Drafter.forward

    def spied(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["hidden_states"].clone())
        return original(self, input_ids, *args, **kwargs)

    chats, texts = random_prompts([3, 30]), random_prompts([1, 17], seed=1)
    with running_engine(folder, speculative_config=drafts_by("eagle", head), **OPTIONS) as llm:
        monkeypatch.setattr(Drafter, "forward", spied)
        run_together(llm, named("chat", chats, greedy(4)) | named("text", texts, EMBED))
    reference = ReferenceEmbedder(folder)
    special_ids = reference.gem_config.special_token_ids
    sequences: list[Tokens] = [*chats, *([*text, *special_ids] for text in texts)]
    for states in map(reference.hidden_states, sequences):
        # Somewhere: the runners order a step's requests in their own ways.
        windows = given[0].unfold(0, len(states), 1).mT
        assert any(torch.allclose(window, states, rtol=1e-3, atol=1e-4) for window in windows)
