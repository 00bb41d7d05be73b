"""The losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gem_vllm.training.losses import (
    alpha_at,
    info_nce,
    leading,
    next_token_loss,
    next_token_total,
    pool,
)
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.trainer import learning_rate_at


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_info_nce_is_its_formula() -> None:
    anchors, positives = unit(5, 8, seed=0), unit(5, 8, seed=1)
    scale = torch.tensor(math.log(20.0))
    by_hand = 0.0
    for i in range(5):
        scores = [20.0 * float(anchors[i] @ positives[j]) for j in range(5)]
        by_hand += math.log(sum(map(math.exp, scores))) - scores[i]
    one_way = info_nce(anchors, positives, scale, symmetric=False)
    assert float(one_way) == pytest.approx(by_hand / 5, rel=1e-5)
    other_way = info_nce(positives, anchors, scale, symmetric=False)
    both = info_nce(anchors, positives, scale, symmetric=True)
    assert float(both) == pytest.approx(float(one_way + other_way) / 2, rel=1e-5)


def test_info_nce_with_further_negatives_is_its_formula() -> None:
    anchors, positives, negatives = unit(5, 8, seed=0), unit(5, 8, seed=1), unit(3, 8, seed=2)
    scale = torch.tensor(math.log(20.0))
    candidates = torch.cat([positives, negatives])
    by_hand = 0.0
    for i in range(5):
        scores = [20.0 * float(anchors[i] @ candidates[j]) for j in range(8)]
        by_hand += math.log(sum(map(math.exp, scores))) - scores[i]
    found = info_nce(anchors, positives, scale, symmetric=False, negatives=negatives)
    assert float(found) == pytest.approx(by_hand / 5, rel=1e-5)
    none = info_nce(anchors, positives, scale, symmetric=True, negatives=negatives[:0])
    assert float(none) == float(info_nce(anchors, positives, scale, symmetric=True))


def test_info_nce_without_repeats_is_its_formula() -> None:
    anchors, positives, negatives = unit(3, 8, seed=0), unit(3, 8, seed=1), unit(2, 8, seed=2)
    scale = torch.tensor(math.log(20.0))
    repeats = torch.zeros(3, 5, dtype=torch.bool)
    repeats[0, 2] = repeats[2, 0] = repeats[1, 3] = True
    options = {"negatives": negatives, "repeats": repeats}
    found = info_nce(anchors, positives, scale, symmetric=True, **options)
    to, back = torch.cat([positives, negatives]), anchors
    expected = [
        F.cross_entropy(20.0 * query[None, row] @ among[seen].T, torch.tensor([seen.index(row)]))
        for query, among, left in (
            (anchors, to, [[0, 1, 3, 4], [0, 1, 2, 4], [1, 2, 3, 4]]),
            (positives, back, [[0, 1], [0, 1, 2], [1, 2]]),
        )
        for row, seen in enumerate(left)
    ]
    torch.testing.assert_close(found, sum(expected) / 6)


@pytest.mark.parametrize(("given", "used"), [(-1.0, 0.0), (9.0, math.log(100))])
def test_temperature_is_clamped(given: float, used: float) -> None:
    pair = unit(4, 8, seed=0), unit(4, 8, seed=1)
    found = info_nce(*pair, torch.tensor(given), symmetric=False)
    assert float(found) == float(info_nce(*pair, torch.tensor(used), symmetric=False))


def test_the_leading_part_of_an_embedding_is_one() -> None:
    embeddings = unit(3, 8, seed=0)
    short = leading(embeddings, 5)
    assert torch.allclose(short.norm(dim=-1), torch.ones(3))
    assert torch.allclose(short * embeddings[:, :5].norm(dim=-1, keepdim=True), embeddings[:, :5])
    assert leading(embeddings, None) is embeddings


def test_pooling() -> None:
    hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    mean, concat = pool(hidden, "mean"), pool(hidden, "concat")
    assert mean.shape == (2, 4)
    assert concat.shape == (2, 12)
    assert mean.dtype == concat.dtype == torch.float32
    torch.testing.assert_close(mean, F.normalize(hidden.float().mean(1), dim=-1))
    torch.testing.assert_close(concat.norm(dim=-1), torch.ones(2))


def test_next_token_loss_of_nothing_is_zero() -> None:
    logits = torch.zeros(0, 7, requires_grad=True)
    loss = next_token_loss(next_token_total(logits, torch.zeros(0, dtype=torch.int64)), 0)
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    ("schedule", "values"),
    [("constant", [0.5, 0.5, 0.5]), ("step", [0.0, 0.0, 0.5]), ("linear", [0.0, 0.25, 0.5])],
)
def test_alpha_schedules(schedule: str, values: list[float]) -> None:
    found = [alpha_at(step, schedule, value=0.5, switch_step=10) for step in (0, 5, 10)]
    assert found == values


def test_each_phase_has_its_own_learning_rate(tmp_path) -> None:
    options = TrainOptions(
        base=tmp_path,
        data=("x",),
        out=tmp_path / "out",
        mode="full",
        steps=200,
        alpha_steps=100,
        warmup_share=0.1,
    )
    rates = [learning_rate_at(step, options) for step in range(201)]
    assert rates[0] == pytest.approx(1e-4 / 21)
    assert rates[20] == pytest.approx(1e-4)
    assert rates[99] / rates[100] == pytest.approx(10, rel=0.02)
    assert rates[200] == pytest.approx(0, abs=1e-12)
