"""Requests of random kind and length that arrive at random, and what each of them should give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from vllm import LLM, PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import EMBED, cosines

# Of a token's logit to the best one's, in float32: the order of sums differs.
LOGIT_GAP = 1e-3
COSINE = 0.9999


@dataclass
class Request:
    """One request: what is sent, and when it is given up."""

    prompt: list[int]
    params: SamplingParams | PoolingParams
    priority: int = 0
    abort_after: int | None = None
    lora: LoRARequest | None = None


@dataclass
class RandomLoad:
    """A seeded source of requests.

    Attributes:
        reference: for the checkpoint that is served.
        limit: the engine's longest sequence.
        seed: of everything.
        abort_share: of requests that are given up, some steps after they were sent.
        longest, longest_answer: of prompts and of answers, in tokens.
        lora: that every other prompt without runs is answered with.
    """

    reference: ReferenceEmbedder
    limit: int
    seed: int
    abort_share: float = 0.0
    longest: int = 200
    longest_answer: int = 30
    lora: LoRARequest | None = None
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def request(self) -> Request:
        """A text to embed, a prompt to answer, or one of either with runs in it."""
        runs = self.random.choice([0, 0, 0, 1, 2])
        first = prompt = self._text()
        for _ in range(runs):
            prompt = [*prompt, *self.reference.gem_config.special_token_ids, *self._text()]
        # Padding before runs is the engine's own.
        if len(prompt) + 128 * runs + self.longest_answer + 10 > self.limit:
            prompt = first[: self.random.randint(1, 20)]
        params: SamplingParams | PoolingParams = EMBED.clone()
        if self.random.random() < 0.5:
            new = self.random.randint(1, self.longest_answer)
            params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        abort = self.random.random() < self.abort_share
        request = Request(
            prompt,
            params,
            priority=self.random.randint(0, 3),
            abort_after=self.random.randint(0, 20) if abort else None,
        )
        answered = isinstance(params, SamplingParams) and prompt is first
        if self.lora is not None and answered and self.random.random() < 0.5:
            request.lora = self.lora
        return request

    def _text(self) -> list[int]:
        # Half of them start alike, so that the prefix cache has something to do.
        shared = Random(7)
        start = [shared.randint(3, 399) for _ in range(64)] if self.random.random() < 0.5 else []
        longest = self.longest if self.random.random() < 0.3 else 40
        own = [self.random.randint(3, 399) for _ in range(self.random.randint(1, longest))]
        return start[: self.random.randint(0, 64)] + own


def run_load(
    llm: LLM, load: RandomLoad, count: int, *, at_once: int, priorities: bool = False
) -> list[tuple[Request, Any]]:
    """Send ``count`` requests, up to ``at_once`` at a time; those not given up, with outputs."""
    engine = llm.llm_engine
    sent: dict[str, Request] = {}
    abort_at: dict[str, int] = {}
    done: list[tuple[Request, Any]] = []
    started = step = 0
    while started < count or sent:
        for _ in range(load.random.choice([0, 0, 1, 2, at_once])):
            if started == count or len(sent) >= at_once:
                break
            name, request = f"load-{load.seed}-{started}", load.request()
            priority = request.priority if priorities else 0
            prompt: Any = {"prompt_token_ids": request.prompt}
            engine.add_request(
                name, prompt, request.params, priority=priority, lora_request=request.lora
            )
            sent[name] = request
            if request.abort_after is not None:
                abort_at[name] = step + request.abort_after
            started += 1
        given_up = [name for name, when in abort_at.items() if when <= step and name in sent]
        engine.abort_request(given_up)
        for name in given_up:
            del sent[name]
        for output in engine.step():
            if output.finished and output.request_id in sent:
                done.append((sent.pop(output.request_id), output))
        step += 1
    return done


def check(
    reference: ReferenceEmbedder,
    done: Sequence[tuple[Request, Any]],
    with_lora: Callable[[list[int]], torch.Tensor] | None = None,
) -> None:
    """Every output against the reference: embeddings by cosine, greedy tokens by their logits.

    Args:
        reference: for the checkpoint that was served.
        done: of `run_load`.
        with_lora: the base's logits with the load's LoRA, [n, vocab] of n token ids.
    """
    special_ids = list(reference.gem_config.special_token_ids)
    k = len(special_ids)
    for request, output in done:
        if isinstance(request.params, PoolingParams):
            states = reference.hidden_states([*request.prompt, *reference.gem_config.appended_ids])[
                -k:
            ].float()
            assert cosines(output.outputs.data[None], states.mean(0)[None]) >= COSINE, request
            continue
        tokens = list(output.outputs[0].token_ids)
        assert len(tokens) == request.params.max_tokens, request
        of = reference.logits if request.lora is None else with_lora
        assert of is not None
        logits = of(request.prompt + tokens)[len(request.prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert (logits.max(dim=1).values - chosen).max() <= LOGIT_GAP, (request, tokens)
