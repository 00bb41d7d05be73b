"""How well a model embeds so far: cosines of held-out pairs against their human scores."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from gem_vllm.errors import GemError
from gem_vllm.training.data import is_jsonl, is_number, read_jsonl
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.sequences import Template, pad

FIELDS = ("sentence1", "sentence2", "score")
TEXTS_AT_ONCE = 64


class HeldOutPairs:
    """Scored pairs of texts, tokenized as prompts are.

    Args:
        file: a .jsonl file, also .gz, of objects with ``sentence1``, ``sentence2``, ``score``.
        tokenizer: the base's.
        template: what goes around a text.
        max_content: longer texts are cut to so many tokens.

    Raises GemError, with the line, for what cannot be read, and where scores do not differ.
    """

    def __init__(self, file: Path, tokenizer: Any, template: Template, max_content: int) -> None:
        if not os.path.isfile(file) or not is_jsonl(file):
            raise GemError(f"--held-out-pairs {file}: give a .jsonl or .jsonl.gz file")
        pairs = _read_scored_pairs(file)
        self.scores = torch.tensor([float(pair["score"]) for pair in pairs])
        if not pairs or bool((self.scores == self.scores[0]).all()):
            raise GemError(f"--held-out-pairs {file}: needs pairs with scores that differ")
        texts = [pair[side] for side in ("sentence1", "sentence2") for pair in pairs]
        contents = tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.rows = [template.wrap_to_embed(content[:max_content]) for content in contents]

    @torch.no_grad()
    def spearman(self, model: GemTrainingModel) -> float:
        """Spearman's correlation of the pairs' cosines with their scores; nan for equal cosines."""
        import scipy.stats  # takes a while

        model.eval()
        device = next(model.parameters()).device
        order = sorted(range(len(self.rows)), key=lambda row: len(self.rows[row]))
        pooled: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), TEXTS_AT_ONCE):
            chosen = order[start : start + TEXTS_AT_ONCE]
            token_ids, lengths = pad([self.rows[row] for row in chosen])
            vectors = model.embed(token_ids.to(device), lengths.to(device))
            pooled |= zip(chosen, vectors.cpu(), strict=True)
        first, second = torch.stack([pooled[row] for row in range(len(order))]).chunk(2)
        cosines = (first * second).sum(dim=-1)
        if bool((cosines == cosines[0]).all()):
            return math.nan  # scipy would say so with a warning
        return float(scipy.stats.spearmanr(cosines.numpy(), self.scores.numpy()).statistic)


def _read_scored_pairs(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file, also .gz, with ``sentence1``, ``sentence2`` and ``score``.

    Raises GemError, with the line, for what cannot be read.
    """
    pairs = []
    for where, pair in read_jsonl(file):
        if not isinstance(pair, dict) or not set(FIELDS) <= pair.keys():
            raise GemError(f"{where}: expected an object with {', '.join(FIELDS)}")
        *sentences, score = (pair[field] for field in FIELDS)
        if not all(isinstance(text, str) for text in sentences) or not is_number(score):
            raise GemError(f"{where}: sentences are text, the score is a number")
        pairs.append(pair)
    return pairs
