"""Development tasks for many trained models of one base, which is computed once for all of them.

In adapter mode a text's keys and values are the base's, whatever was trained. So they are kept, and
a model is measured by its special tokens alone, in seconds. Figures of record come from
``gem-vllm evaluate``, through the engine; tests/benchmarks holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.evaluation.encoder import GemEncoder
from gem_vllm.evaluation.local_tasks import local_task
from gem_vllm.machine import has_cuda
from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.losses import leading, pool
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.modes import embedding_model
from gem_vllm.training.sequences import Template, pad, plain_prompt_template

TASKS = ("STSBenchmark", "STS12", "TRECQA_Reranking", "WikiQA_Reranking", "Cranfield")
# Of a text: what comes behind is cut off. The keys and values of all texts are held in memory.
MAX_TOKENS = 256
TEXTS_AT_ONCE = 64


class Prefixes:
    """Texts in batches of like length, with their keys and values once a model has computed them.

    Args:
        base: folder of the base.
        keep: whether to keep them, for models that leave the base as it is. A GPU has them again
            as soon, and holds the models of others beside.
    """

    def __init__(self, base: Path, *, keep: bool) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self._template = plain_prompt_template(self._tokenizer)
        self._keep = keep and not has_cuda()
        self._device = "cuda" if has_cuda() else "cpu"
        self._kept: dict[tuple[str, ...], list[tuple[list[int], DynamicCache, torch.Tensor]]] = {}

    def states(
        self, model: GemTrainingModel, texts: Sequence[str], instruction: tuple[int, ...]
    ) -> torch.Tensor:
        """Last hidden states [n, k, hidden] of the special tokens behind each text."""
        if not (self._keep and isinstance(model, AdapterModel) and not instruction):
            batches = [
                (rows, model.special_states(*padded))
                for rows, padded in self._batches(texts, instruction)
            ]
        else:
            kept = self._kept.get(tuple(texts))
            if kept is None:
                kept = [
                    (rows, model.prefix_pass(*padded), padded[1])
                    for rows, padded in self._batches(texts, ())
                ]
                self._kept[tuple(texts)] = kept
            batches = [(rows, model.special_pass(cache, lengths)) for rows, cache, lengths in kept]
        first = batches[0][1]
        states = first.new_zeros(len(texts), *first.shape[1:])
        for rows, part in batches:
            states[rows] = part
        return states

    def _batches(
        self, texts: Sequence[str], instruction: tuple[int, ...]
    ) -> list[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]]:
        ids = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        template = Template(self._template.head, self._template.tail, instruction)
        prompts = [template.wrap_to_embed(row[:MAX_TOKENS]) for row in ids]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        parts = [
            order[start : start + TEXTS_AT_ONCE] for start in range(0, len(order), TEXTS_AT_ONCE)
        ]
        return [(rows, self._padded([prompts[row] for row in rows])) for rows in parts]

    def _padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, lengths = pad(prompts)
        return token_ids.to(self._device), lengths.to(self._device)


class CheckpointEmbedder:
    """A GEM checkpoint on transformers, as `gem_vllm.evaluation.encoder.Embedder`.

    Args:
        folder: of the checkpoint.
        prefixes: of its base.
        dtype: to compute in.

    Attributes:
        dimensions: leading numbers of an embedding; None for all.
    """

    def __init__(self, folder: Path, prefixes: Prefixes, *, dtype: torch.dtype) -> None:
        lm, _, config = load_checkpoint(folder, dtype=dtype)
        self._model = embedding_model(lm, config)
        if has_cuda():
            self._model.to("cuda")
        self._instruction = config.instruction_ids
        self._prefixes = prefixes
        self.dimensions: int | None = None

    @torch.no_grad()
    def embed(self, texts: list[str]) -> np.ndarray:
        states = self._prefixes.states(self._model, texts, self._instruction)
        return leading(pool(states, self._model.pooling), self.dimensions).cpu().numpy()


def development_scores(embedder: Any, tasks: Path) -> dict[str, float]:
    """Main score of each task of ``TASKS``, from folders in ``tasks``."""
    encoder = GemEncoder(embedder, "development", "0")
    scores = {}
    for name in TASKS:
        result = mteb.evaluate(
            encoder,
            local_task(tasks / name),
            cache=None,
            co2_tracker=False,
            show_progress_bar=False,
        )
        scores[name] = float(result.task_results[0].main_score)
    return scores
