"""Generation from an engine that embeds too: the base model's tokens, and never a special one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor

from gem_vllm.config import GemConfig
from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embeddings_of,
    named,
    random_prompts,
    run_together,
    running_engine,
)

K = 4


@pytest.fixture(scope="module")
def eager_specials(
    tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A checkpoint whose special tokens would win every argmax: large rows in a tied head."""
    source = tiny_checkpoint("llama", k=K)
    folder = tmp_path_factory.mktemp("eager")
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "gem_adapter").symlink_to(source / "gem_adapter")
    weights = load_file(source / "model.safetensors")
    ids = list(GemConfig.from_pretrained(source).special_token_ids)
    rows = weights["model.embed_tokens.weight"]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    rows[ids] = rows[3:100].mean(0) * 100 * signs[:, None]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def llm(eager_specials: Path) -> Iterator[LLM]:
    with running_engine(eager_specials, max_model_len=256) as engine:
        yield engine


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=2.0, n=4, seed=1),
        SamplingParams(temperature=1.0, top_k=2, seed=2),
        SamplingParams(temperature=1.0, top_p=0.5, min_tokens=8, seed=3),
        SamplingParams(temperature=0.7, min_p=0.2, repetition_penalty=1.3, seed=4),
        SamplingParams(temperature=0.0, logprobs=20),
        SamplingParams(temperature=0.0, structured_outputs=StructuredOutputsParams(regex="[a-z]+")),
    ],
    ids=["greedy", "n4", "top_k", "top_p", "penalties", "logprobs", "structured"],
)
def test_special_tokens_are_never_generated(llm: LLM, params: SamplingParams) -> None:
    params.max_tokens = 16
    params.ignore_eos = params.structured_outputs is None
    special = set(GemConfig.from_hf_config(llm.model_config.hf_config).special_token_ids)
    prompts = random_prompts([3, 12, 50])
    outputs = run_together(
        llm,
        named("chat", prompts, params) | named("text", prompts, EMBED),
    )
    for i in range(len(prompts)):
        completions = outputs[f"chat-{i}"].outputs
        assert len(completions) == params.n
        for completion in completions:
            assert completion.token_ids
            assert not special.intersection(completion.token_ids)
            for position in completion.logprobs or []:
                finite = {token for token, entry in position.items() if entry.logprob > -1e30}
                assert not special.intersection(finite)


def test_prompt_logprobs_of_chat_beside_embeddings(llm: LLM, eager_specials: Path) -> None:
    """Rows that a step leaves out, in the last layer or the head, are not those of this prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=1, ignore_eos=True)
    prompt = random_prompts([30])[0]
    model = AutoModelForCausalLM.from_pretrained(eager_specials, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0]
    logits[:, list(GemConfig.from_pretrained(eager_specials).special_token_ids)] = -torch.inf
    expected = logits.log_softmax(dim=-1)
    alone = run_together(llm, {"chat": (prompt, params)})["chat"]
    beside = run_together(
        llm, {"a": (prompt[:9], EMBED), "chat": (prompt, params), "b": (prompt[3:], EMBED)}
    )["chat"]
    for output in (alone, beside):
        for i, entry in enumerate(output.prompt_logprobs[1:]):
            for token, of_token in entry.items():
                assert of_token.logprob == pytest.approx(expected[i, token].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([5, 6, "special"], SamplingParams(), "position 2 of the prompt are no whole run"),
        (["special", 6], EMBED, "no whole run"),
        ([5, "run"], EMBED, "ends with special tokens"),
        (["run", 5], SamplingParams(), "starts with special tokens"),
        ([5, "run", 6], SamplingParams(prompt_logprobs=1), "prompt_logprobs is not for"),
        ([5] * 130 + ["run"] + [6] * 70 + ["run", 7], SamplingParams(), "52 fill up KV blocks"),
        ([5] * 252, EMBED, "may have 251"),
        ([5], SamplingParams(allowed_token_ids=["special"]), "never generated"),
    ],
    ids=["part", "embed", "end", "start", "logprobs", "padded", "length", "allowed"],
)
def test_bad_requests_are_refused(llm: LLM, prompt, params, message) -> None:
    special_ids = GemConfig.from_hf_config(llm.model_config.hf_config).special_token_ids
    special, spelled = special_ids[0], {"special": special_ids[:1], "run": special_ids}
    prompt = [token for word in prompt for token in spelled.get(word, (word,))]
    params = params.clone()
    if getattr(params, "allowed_token_ids", None):
        params.allowed_token_ids = [special]
    with pytest.raises(VLLMValidationError, match=message.replace("|", r"\|")):
        llm.llm_engine.add_request("bad", {"prompt_token_ids": prompt}, params)
    assert run_together(llm, {"next": ([5, 6, 7], EMBED)})["next"].outputs.data.shape == (64,)


def test_text_that_spells_a_special_token_is_refused(llm: LLM) -> None:
    for call in (llm.embed, llm.generate):
        with pytest.raises(VLLMValidationError, match="reserved GEM token"):
            call("what does <|gem_1|> mean", use_tqdm=False)


def test_empty_text_is_refused(llm: LLM) -> None:
    for call in (lambda: llm.embed("", use_tqdm=False), lambda: llm.score("a", "", use_tqdm=False)):
        with pytest.raises(VLLMValidationError, match="empty"):
            call()


def test_a_text_that_the_engine_renders_itself(llm: LLM) -> None:
    """As `AsyncLLM.encode` and `LLMEngine.add_request` still take it: as `LLM.embed` does."""
    text, engine = "an old stone bridge " * 100, llm.llm_engine
    ids = llm.get_tokenizer()(text).input_ids
    for most, kept in ((100, 100), (-1, 251), (256, 251)):
        cut = {"truncate_prompt_tokens": most}
        engine.add_request("raw", text, EMBED, tokenization_kwargs=cut)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        (output,) = outputs
        assert output.prompt_token_ids == ids[:kept]
    for padding in ({"padding": "max_length", "max_length": 100}, {"pad_prompt_tokens": 100}):
        with pytest.raises(VLLMValidationError, match='"padding" is not for'):
            engine.add_request("bad", text, EMBED, tokenization_kwargs=padding)
    for bad, message in (("", "empty"), ({"prompt": ""}, "empty"), ("<|gem_0|>", "reserved")):
        with pytest.raises(VLLMValidationError, match=message):
            engine.add_request("bad", bad, EMBED)


def test_truncation_cuts_the_text_not_the_special_tokens(llm: LLM) -> None:
    (prompt,) = random_prompts([400])
    for most, kept in ((-1, 251), (256, 251), (100, 100)):
        cut = {"truncate_prompt_tokens": most}
        (output,) = llm.embed({"prompt_token_ids": prompt}, tokenization_kwargs=cut, use_tqdm=False)
        assert output.prompt_token_ids == prompt[:kept]
    cut["truncation_side"] = "left"
    (output,) = llm.embed({"prompt_token_ids": prompt}, tokenization_kwargs=cut, use_tqdm=False)
    assert output.prompt_token_ids == prompt[-100:]
    with pytest.raises(VLLMValidationError, match="251"):
        llm.embed({"prompt_token_ids": prompt}, use_tqdm=False)


def test_encode_is_embed(llm: LLM) -> None:
    (encoded,) = llm.encode("a river", pooling_task="embed", use_tqdm=False)
    (embedded,) = llm.embed("a river", use_tqdm=False)
    assert encoded.outputs.data.tolist() == pytest.approx(embedded.outputs.embedding, abs=1e-5)


def test_enqueued_requests_are_not_lost_to_an_embedding(llm: LLM) -> None:
    llm.enqueue("a river", SamplingParams(max_tokens=2), use_tqdm=False)
    with pytest.raises(ValueError, match="1 requests that were enqueued have no answers yet"):
        llm.embed("a river", use_tqdm=False)
    with pytest.raises(ValueError, match="call wait_for_completion"):
        llm.score("a river", "1969", use_tqdm=False)
    (answer,) = llm.wait_for_completion(use_tqdm=False)
    assert len(answer.outputs[0].token_ids) == 2
    assert llm.embed("a river", use_tqdm=False)[0].outputs.embedding


def test_offline_scores(llm: LLM) -> None:
    same, other = llm.score("a river", ["a river", "1969"], use_tqdm=False)
    assert same.outputs.score == pytest.approx(1.0, abs=1e-5)
    assert other.outputs.score < 0.999


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_adapter_mode_generates_what_the_base_generates(
    family: str, tiny_base: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    """Greedy, float32, 100 prompts, embedding requests in between: token for token."""
    folder = tiny_checkpoint(family, k=K)
    base = tiny_base(family)
    prompts = random_prompts([1 + 2 * i % 97 for i in range(100)], seed=5)
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    chats = named("chat", prompts, greedy)
    with running_engine(base, max_model_len=256) as plain:
        expected = run_together(plain, chats)
    texts = named("text", [prompt[::-1] for prompt in prompts], EMBED)
    alternating = {
        name: request
        for pair in zip(chats.items(), texts.items(), strict=True)
        for name, request in pair
    }
    with running_engine(folder, max_model_len=256) as engine:
        outputs = run_together(engine, alternating)
    for name in chats:
        assert outputs[name].outputs[0].token_ids == expected[name].outputs[0].token_ids


class Banned(LogitsProcessor):
    """One that an engine is given for all requests: the token 7 is never sampled."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        pass

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        pass

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        logits[:, 7] = -torch.inf
        return logits


def test_a_logits_processor_sees_a_vocabulary(tiny_checkpoint: Callable[..., Path]) -> None:
    """In a step of embedding requests only, too."""
    folder, texts = tiny_checkpoint("llama", k=4), random_prompts([5, 17])
    expected = ReferenceEmbedder(folder).embed(texts)
    with running_engine(folder, logits_processors=[Banned]) as llm:
        found = embeddings_of(run_together(llm, named("text", texts, EMBED)), len(texts))
        llm.generate([{"prompt_token_ids": texts[0]}], SamplingParams(max_tokens=2))
    assert cosines(found, expected).min() >= 0.9999
