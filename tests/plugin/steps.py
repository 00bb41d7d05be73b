"""Engine steps from token ids, without an engine."""

from __future__ import annotations

import numpy as np
import torch

from gem_vllm.plugin.runs import find_runs
from gem_vllm.plugin.step import GemStep

SPECIAL = (900, 901, 902)


def step_of(embedding: set[int], *requests: tuple[list[int], int, int]) -> GemStep | None:
    """`requests`: token ids, tokens computed before, tokens computed in this step."""
    prompts, computed, scheduled = zip(*requests, strict=True)
    runs = {i: found for i, ids in enumerate(prompts) if (found := find_runs(ids, SPECIAL))}
    columns = np.array(computed), np.array(scheduled)
    return GemStep.of_batch(runs, embedding, *columns, torch.device("cpu"))
