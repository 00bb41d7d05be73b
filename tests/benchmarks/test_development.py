"""Models of the ablations are measured by the vectors that the engine would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from development import CheckpointEmbedder, Prefixes

from gem_vllm.reference import ReferenceEmbedder

TEXTS = ["An old stone bridge over the river.", "bread", "In 1969 people walked on the moon. " * 4]


@pytest.mark.parametrize(
    ("mode", "instruction_ids"), [("adapter", ()), ("adapter", (70, 71)), ("full", ())]
)
def test_kept_prefixes_give_the_references_vectors(
    mode: str, instruction_ids: tuple[int, ...], tiny_checkpoint: Callable[..., Path]
) -> None:
    options = {"train_mode": mode, "instruction_ids": instruction_ids}
    base = tiny_checkpoint("llama", **options)
    prefixes = Prefixes(base, keep=mode == "adapter")
    for checkpoint in (base, tiny_checkpoint("llama", k=1, pooling="concat", **options)):
        expected = ReferenceEmbedder(checkpoint).embed(TEXTS)
        embedder = CheckpointEmbedder(checkpoint, prefixes, dtype=torch.float32)
        for _ in range(2):
            found = torch.from_numpy(embedder.embed(TEXTS))
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    embedder.dimensions = 16
    short = torch.nn.functional.normalize(expected[:, :16], dim=1)
    torch.testing.assert_close(torch.from_numpy(embedder.embed(TEXTS)), short, atol=1e-5, rtol=1e-4)
