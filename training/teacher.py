"""A checkpoint whose cosines a lexical batch teaches beside those of words."""

from __future__ import annotations

from pathlib import Path

import torch

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.errors import GemError
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.modes import embedding_model


def load_teacher(
    folder: Path,
    vocabulary: dict[str, int],
    instruction: tuple[int, ...],
    *,
    dtype: torch.dtype,
    rows_per_pass: int | None,
) -> GemTrainingModel:
    """The GEM checkpoint in a folder, which is to read the token ids that are trained on.

    vocabulary: the base's; instruction: token ids between a text and the special tokens; dtype: to
    compute in; rows_per_pass: texts at once. Raises GemError where it would read them as others.
    """
    lm, tokenizer, gem_config = load_checkpoint(folder, dtype=dtype)
    if not vocabulary.items() <= tokenizer.get_vocab().items():
        raise GemError(
            f"--teacher {folder} has another vocabulary than --base; name a checkpoint of "
            "that base, or of its family"
        )
    if gem_config.instruction_ids != instruction:
        raise GemError(f"--teacher {folder} has another instruction; give the same")
    teacher = embedding_model(lm, gem_config)
    teacher.rows_per_pass = rows_per_pass
    return teacher
