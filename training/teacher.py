"""A checkpoint whose cosines a lexical batch teaches beside those of words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.modes import embedding_model

# Of a text that tells whether two bases are one: every weight has a part in what they become.
PROBE_TOKENS = 64


@dataclass(frozen=True)
class Teacher:
    """Is no module, and so no part of the model that it teaches.

    Attributes:
        model: nothing of it is trained.
        same_prefixes: keys and values of texts are those that the model it teaches computes.
    """

    model: GemTrainingModel
    same_prefixes: bool


def load_teacher(
    folder: Path,
    vocabulary: dict[str, int],
    instruction: tuple[int, ...],
    taught: GemTrainingModel,
    *,
    dtype: torch.dtype,
    rows_per_pass: int | None,
) -> Teacher:
    """The GEM checkpoint in a folder, which is to read the token ids that are trained on.

    vocabulary: the base's; instruction: token ids between a text and the special tokens; taught:
    by it; dtype: to compute in; rows_per_pass: texts at once. Raises GemError where it would read
    them as others.
    """
    lm, tokenizer, gem_config = load_checkpoint(folder, dtype=dtype)
    if not vocabulary.items() <= tokenizer.get_vocab().items():
        raise GemError(
            f"--teacher {folder} has another vocabulary than --base; name a checkpoint of "
            "that base, or of its family"
        )
    if gem_config.instruction_ids != instruction:
        raise GemError(f"--teacher {folder} has another instruction; give the same")
    model = embedding_model(lm, gem_config)
    model.rows_per_pass = rows_per_pass
    return Teacher(model, same_prefixes=_same_prefixes(model, taught))


@torch.no_grad()
def _same_prefixes(one: GemTrainingModel, other: GemTrainingModel) -> bool:
    """Whether both are adapters of one base: it embeds all tokens alike, and a text's are alike."""
    if not (isinstance(one, AdapterModel) and isinstance(other, AdapterModel)):
        return False
    special = {*one.special_ids, *other.special_ids}
    size = min(one.config.vocab_size, other.config.vocab_size)
    tokens = torch.tensor([i for i in range(size) if i not in special])
    embeds = [model.base.get_input_embeddings()(tokens) for model in (one, other)]
    text = tokens[:: math.ceil(len(tokens) / PROBE_TOKENS)][None]
    length = torch.tensor([text.shape[1]])
    prefixes = [model.prefix_pass(text, length) for model in (one, other)]
    return (
        torch.equal(*embeds)
        and torch.equal(*(prefix.keys for prefix in prefixes))
        and torch.equal(*(prefix.values for prefix in prefixes))
    )
