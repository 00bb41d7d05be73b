"""One engine under every option that users set: each output is the float32 reference's.

Requests to embed and to answer, with and without runs inside them, arrive at random and some are
given up; afterwards the engine holds nothing of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from gem_vllm.plugin.scheduler import _is_prompt_left
from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embed,
    embeddings_of,
    free_blocks,
    is_interpreted,
    named,
    noted_preemptions,
    random_prompts,
    run_together,
    running_engine,
    scheduler_of,
)
from tests.plugin.random_load import RandomLoad, Request, check, run_load
from tests.tiny import FAMILIES

LIMIT = 512
REQUESTS = 30 if is_interpreted() else 60
BY_THE_BASE = {"method": "draft_model", "num_speculative_tokens": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "chunks of 16 tokens": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "no prefix cache": {"enable_prefix_caching": False},
    "few KV blocks": {"num_gpu_blocks_override": 24},
    "few KV blocks, no prefix cache": {
        "num_gpu_blocks_override": 24,
        "enable_prefix_caching": False,
    },
    "by priority": {"scheduling_policy": "priority", "num_gpu_blocks_override": 24},
    "one at a time": {"max_num_seqs": 1},
    "few tokens beside chat": {"additional_config": {"gem_tokens_beside_chat": 24}},
    "LoRAs": {"enable_lora": True},
    "answers in parts": {"stream_interval": 8},
    "compiled": {"enforce_eager": False},
    "a draft model": {"speculative_config": BY_THE_BASE},
    "a draft model, few KV blocks": {
        "speculative_config": BY_THE_BASE,
        "num_gpu_blocks_override": 24,
        "max_num_batched_tokens": 64,
    },
}


def held(llm: LLM) -> dict[str, Any]:
    """What an engine holds of requests: free KV blocks, and entries by request."""
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    scheduler = core.scheduler
    return {
        "free": free_blocks(llm),
        "requests": len(scheduler.requests),
        "embedding": len(runner.gem_batch.pooling_params),
        "states": len(runner.gem_batch.partial_states),
        "runs": len(runner.gem_batch.runs) + len(scheduler._runs),
    }


@dataclass
class Lora:
    """An ordinary LoRA of the tiny base: what a request for it sends, and what it gives."""

    request: LoRARequest
    model: PeftModel

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """float32 [n, vocab] of n token ids."""
        return self.model(torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def lora(tiny_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Lora:
    base = AutoModelForCausalLM.from_pretrained(tiny_base("llama"))
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=64, target_modules=modules, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    folder = tmp_path_factory.mktemp("lora")
    model.save_pretrained(folder)
    return Lora(LoRARequest("mine", 1, str(folder)), model)


def serve_load(
    llm: LLM, load: RandomLoad, count: int, lora: Lora | None = None, **options: Any
) -> list[Request]:
    """Run a load and check it, and that nothing is left of it; what was not given up of it."""
    run_together(llm, {"first": ([5, 6], EMBED)})
    before = held(llm)
    done = run_load(llm, load, count, **options)
    check(load.reference, done, with_lora=lora and lora.logits)
    # What a finished request leaves in the runner goes with the next step.
    run_together(llm, {"last": ([5, 6], EMBED)})
    assert held(llm) == before
    return [request for request, _ in done]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_any_option(
    options: dict[str, Any],
    lora: Lora,
    tiny_checkpoint: Callable[..., Path],
    tiny_base: Callable[..., Path],
) -> None:
    folder = tiny_checkpoint("llama", k=4)
    if "speculative_config" in options:
        drafts = {**BY_THE_BASE, "model": str(tiny_base("llama"))}
        options = {**options, "speculative_config": drafts}
    load = RandomLoad(ReferenceEmbedder(folder), LIMIT, seed=1, abort_share=0.1)
    few_blocks = "num_gpu_blocks_override" in options
    if few_blocks:
        load.longest_answer = 100  # in blocks that others want, too
    if "enable_lora" in options:
        load.lora = lora.request
    by_priority = options.get("scheduling_policy") == "priority"
    with running_engine(folder, max_model_len=LIMIT, **options) as llm:
        preempted = noted_preemptions(llm)
        done = serve_load(llm, load, REQUESTS, lora, at_once=24, priorities=by_priority)
    assert bool(preempted) == few_blocks
    assert any(request.lora for request in done) == ("enable_lora" in options)


def test_priority_is_an_order(tiny_checkpoint: Callable[..., Path]) -> None:
    """Of what waits, texts and prompts alike, the lowest number is next."""
    prompts = random_prompts([20, 9, 30, 12, 25, 16])
    priorities = [2, 0, 5, 3, 1, 4]
    greedy = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    with running_engine(
        tiny_checkpoint("llama", k=4),
        max_model_len=LIMIT,
        max_num_seqs=1,
        scheduling_policy="priority",
    ) as llm:
        for i, (prompt, priority) in enumerate(zip(prompts, priorities, strict=True)):
            llm.llm_engine.add_request(
                str(priority),
                {"prompt_token_ids": prompt},
                EMBED if i % 2 else greedy,
                priority=priority,
            )
        finished = []
        while llm.llm_engine.has_unfinished_requests():
            finished += [each.request_id for each in llm.llm_engine.step() if each.finished]
    assert finished == ["0", "1", "2", "3", "4", "5"]


def test_a_step_has_few_tokens_beside_chat(tiny_checkpoint: Callable[..., Path]) -> None:
    """Texts wait for their share while chats are answered, and no longer."""
    chats = named(
        "chat", random_prompts([5, 9, 12]), SamplingParams(max_tokens=30, ignore_eos=True)
    )
    texts = named("text", random_prompts([100] * 12, seed=1), EMBED)
    cap, steps = 24, []
    with running_engine(
        tiny_checkpoint("llama", k=4),
        max_model_len=LIMIT,
        max_num_batched_tokens=256,
        additional_config={"gem_tokens_beside_chat": cap},
    ) as llm:
        scheduler = scheduler_of(llm)
        schedule = scheduler.schedule

        def noted(*args: Any, **kwargs: Any) -> Any:
            answered = [r.request_id for r in scheduler.running if not _is_prompt_left(r)]
            output = schedule(*args, **kwargs)
            steps.append((answered, output.num_scheduled_tokens))
            return output

        scheduler.schedule = noted
        outputs = run_together(llm, chats | texts)
    assert all(len(outputs[name].outputs[0].token_ids) == 30 for name in chats)
    beside = [
        (sum(tokens.values()), len(answered)) for answered, tokens in steps if answered and tokens
    ]
    assert beside
    assert all(total <= count + cap for total, count in beside)
    assert max(total for total, _ in beside) > cap, "the share is used"
    alone = [sum(tokens.values()) for answered, tokens in steps if not answered]
    assert max(alone) > cap + len(chats), "without chats there is no limit"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family(family: str, tiny_checkpoint: Callable[..., Path]) -> None:
    """In chunks and out of few KV blocks at once, where the most can go wrong."""
    folder = tiny_checkpoint(family, k=4)
    load = RandomLoad(ReferenceEmbedder(folder), LIMIT, seed=2, abort_share=0.1)
    with running_engine(
        folder, max_model_len=LIMIT, max_num_batched_tokens=64, num_gpu_blocks_override=60
    ) as llm:
        serve_load(llm, load, 50, at_once=16)


@pytest.mark.parametrize("k", [1, 16])
def test_many_at_once(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=k)
    load = RandomLoad(ReferenceEmbedder(folder), LIMIT, seed=3)
    with running_engine(folder, max_model_len=LIMIT) as llm:
        for at_once in (1, 256):
            serve_load(llm, load, at_once, at_once=at_once)


SAMPLING = {
    "n": SamplingParams(temperature=1e-4, n=3, max_tokens=8, seed=1),
    "logprobs": SamplingParams(temperature=0.0, max_tokens=8, logprobs=5, ignore_eos=True),
    "prompt_logprobs": SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3),
    "stop": SamplingParams(temperature=0.0, max_tokens=40, stop=["a", "e"], ignore_eos=True),
    "min_tokens": SamplingParams(temperature=0.0, max_tokens=12, min_tokens=10),
    "penalties": SamplingParams(temperature=0.0, max_tokens=12, repetition_penalty=1.5,
                                presence_penalty=0.5, frequency_penalty=0.5),
    "bad_words": SamplingParams(temperature=0.0, max_tokens=12, bad_words=["the", "a"]),
    "structured": SamplingParams(temperature=0.0, max_tokens=12,
                                 structured_outputs=StructuredOutputsParams(regex="[a-z ]{3,9}")),
    "json": SamplingParams(temperature=0.0, max_tokens=40,
                           structured_outputs=StructuredOutputsParams(
                               json={"type": "object", "properties": {"a": {"type": "boolean"}},
                                     "required": ["a"], "additionalProperties": False})),
    "logit_bias": SamplingParams(temperature=0.0, max_tokens=8, logit_bias={50: 9.0, 60: -9.0}),
}  # fmt: skip


# Before, a seeded generator moved on by the size of the vocabulary with every token, on a CPU; and
# the special tokens are in that.
NOISE_IS_OF_THE_TOKEN = Version(version("vllm")) >= Version("0.32")


def told(output: Any) -> list[Any]:
    """What a user is told of a generation, logprobs rounded."""

    def rounded(logprobs: Any) -> Any:
        return [
            position and {token: round(entry.logprob, 3) for token, entry in position.items()}
            for position in logprobs or ()
        ]

    return [
        rounded(output.prompt_logprobs),
        [(c.token_ids, c.text, c.finish_reason, rounded(c.logprobs)) for c in output.outputs],
    ]


def test_sampling_options_beside_embeddings(
    tiny_base: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    """As plain vLLM serves the base, with texts to embed in the same steps."""
    prompts = dict(zip(SAMPLING, random_prompts(range(5, 5 + 9 * len(SAMPLING), 9)), strict=True))
    requests = {name: (prompts[name], params) for name, params in SAMPLING.items()}
    texts = named("text", random_prompts(range(1, 150, 7), seed=9), EMBED)
    with running_engine(tiny_base("llama"), max_model_len=256) as plain:
        expected = run_together(plain, requests)
    with running_engine(tiny_checkpoint("llama", k=4), max_model_len=256) as llm:
        found = run_together(llm, {**texts, **requests})
        if not NOISE_IS_OF_THE_TOKEN:
            expected |= run_together(llm, {"n": requests["n"]})
    for name in SAMPLING:
        assert told(found[name]) == told(expected[name]), name


def test_ordinary_loras_beside_the_adapter(
    lora: Lora, tiny_base: Callable[..., Path], tiny_checkpoint: Callable[..., Path]
) -> None:
    """A LoRA request is answered as plain vLLM answers it, in steps with texts to embed."""
    prompts, texts = random_prompts([5, 40, 100]), random_prompts([1, 30, 140], seed=3)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    options: dict[str, Any] = {"max_model_len": 256, "enable_lora": True, "max_lora_rank": 8}

    def send(llm: LLM, kind: str, request: LoRARequest | None) -> None:
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(
                f"{kind}-{i}", {"prompt_token_ids": prompt}, greedy, lora_request=request
            )

    def answers(outputs: dict[str, Any], kind: str) -> list[list[int]]:
        return [outputs[f"{kind}-{i}"].outputs[0].token_ids for i in range(len(prompts))]

    expected = {}
    with running_engine(tiny_base("llama"), **options) as plain:
        for kind, request in (("lora", lora.request), ("plain", None)):
            send(plain, kind, request)
            expected[kind] = answers(run_together(plain, {}), kind)
    assert expected["lora"] != expected["plain"]

    folder = tiny_checkpoint("llama", k=4)
    reference = ReferenceEmbedder(folder).embed(texts)
    with running_engine(folder, **options) as llm:
        send(llm, "lora", lora.request)
        send(llm, "plain", None)
        outputs = run_together(llm, named("text", texts, EMBED))
        # Again, from the prefix cache, which keeps what a LoRA has computed apart.
        again = embed(llm, texts)
    for kind in ("lora", "plain"):
        assert answers(outputs, kind) == expected[kind]
    for found in (embeddings_of(outputs, len(texts)), again):
        assert cosines(found, reference).min() >= 0.9999
