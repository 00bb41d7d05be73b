"""Prompts and texts, with and without runs in them, and what the reference makes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embeddings_of,
    named,
    random_prompts,
    run_together,
)

Tokens = list[int]


def greedy(new: int) -> SamplingParams:
    """So many tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)


def with_runs(special_ids: Sequence[int], *texts: int, seed: int = 0) -> Tokens:
    """A prompt of random texts of these lengths, with a run between each two."""
    parts = random_prompts(texts, seed=seed)
    prompt = parts[0]
    for part in parts[1:]:
        prompt = [*prompt, *special_ids, *part]
    return prompt


def tokens_of(outputs: dict[str, Any], count: int) -> list[Tokens]:
    """What `run_together` gave for `named("chat", …)`, in its order."""
    return [list(outputs[f"chat-{i}"].outputs[0].token_ids) for i in range(count)]


@dataclass(frozen=True)
class MixedLoad:
    """Requests of both kinds, for the same steps.

    Attributes:
        prompts: to go on from, greedily.
        new: tokens to generate behind each.
        tokens: that the reference generates.
        texts: to embed.
        embeddings: float32 [hidden] of each text: the reference's, before normalization.
    """

    prompts: list[Tokens]
    new: int
    tokens: list[Tokens]
    texts: list[Tokens]
    embeddings: list[torch.Tensor]

    @staticmethod
    def of(folder: Path, prompts: Sequence[Tokens], texts: Sequence[Tokens], new: int) -> MixedLoad:
        """With the answers of the reference, over a checkpoint that pools by the mean.

        Args:
            folder: a checkpoint.
            prompts, texts: token ids; there may be runs in both.
            new: tokens to generate behind each prompt.
        """
        reference = ReferenceEmbedder(folder)
        k, special_ids = reference.gem_config.k, reference.gem_config.special_token_ids
        states = [reference.hidden_states([*text, *special_ids])[-k:] for text in texts]
        return MixedLoad(
            prompts=list(prompts),
            new=new,
            tokens=[reference.generate(prompt, new) for prompt in prompts],
            texts=list(texts),
            embeddings=[of_run.mean(0) for of_run in states],
        )

    def check(self, llm: LLM) -> dict[str, Any]:
        """Give an engine all at once; every answer must be the reference's.

        Returns:
            The outputs, as `run_together` gives them.
        """
        params = greedy(self.new)
        requests = named("chat", self.prompts, params) | named("text", self.texts, EMBED)
        outputs = run_together(llm, requests)
        assert tokens_of(outputs, len(self.prompts)) == self.tokens
        if self.texts:
            found = embeddings_of(outputs, len(self.texts))
            assert cosines(found, torch.stack(self.embeddings)).min() >= 0.9999
        return outputs
