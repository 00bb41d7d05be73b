"""Draft models and EAGLE heads beside a GEM model, for speculative decoding.

A draft has the base's vocabulary, the GEM model's has the special tokens behind it. What is drafted
is accepted only where the GEM model says the same, so that nothing here changes an answer: it sees
to it that a draft is given no token that it does not have. All tokens pass through a draft, those
of texts to embed too, as the prefix cache holds both models' keys and values of a block.

A draft is causal. Behind a run it sees what the GEM model does not, or what others have in those
blocks by then, so that less of what it drafts is accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig

# By vLLM's names: what is drafted from the text alone, and by a model that runs beside ours.
TEXT_METHODS = ("ngram",)
MODEL_METHODS = ("draft_model", "eagle", "eagle3")

if TYPE_CHECKING:
    _Model = Any
else:
    _Model = object


def lacks_special_tokens_only(draft_size: int, size: int, special_ids: Sequence[int]) -> bool:
    """Whether a vocabulary of `draft_size` tokens is one of `size` without special tokens."""
    return draft_size <= size and set(range(draft_size, size)) <= set(special_ids)


class Drafter(_Model):
    """Mixin over the class of a draft model or head; `enable` puts it there.

    Attributes:
        vocab_sizes: the draft's, and the GEM model's.
        pads_logits: whether distributions are compared, of which both have to have one width; else
            the most likely token is all that is taken.
    """

    vocab_sizes: tuple[int, int]
    pads_logits: bool

    @classmethod
    def enable(cls, draft: nn.Module, vllm_config: VllmConfig) -> None:
        """Let a draft that vLLM has loaded, which stays where it is, draft for a GEM model."""
        speculative = vllm_config.speculative_config
        assert speculative is not None
        assert speculative.draft_model_config is not None
        draft.__class__ = type(f"Gem{type(draft).__name__}", (cls, type(draft)), {})
        draft.vocab_sizes = (
            speculative.draft_model_config.get_vocab_size(),
            vllm_config.model_config.get_vocab_size(),
        )
        draft.pads_logits = speculative.draft_sample_method == "probabilistic"

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The draft's own of input_ids int [tokens], where token 0 stands for those it lacks."""
        # In place: a CUDA graph reads them where they were when it was captured.
        input_ids.masked_fill_(input_ids >= self.vocab_sizes[0], 0)
        return super().forward(input_ids, *args, **kwargs)

    def compute_logits(self, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The draft's own, float [rows, vocab]; tokens that it lacks at -inf, where they count."""
        logits = super().compute_logits(*args, **kwargs)
        if logits is None or not self.pads_logits:
            return logits
        draft_size, size = self.vocab_sizes
        return nn.functional.pad(logits, (0, size - draft_size), value=-torch.inf)
