"""Packed rows, and rows of which special tokens see a part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.dense_model import DenseModel
from gem_vllm.training.packing import Packing
from gem_vllm.training.sequences import pad
from tests.tiny import FAMILIES, WINDOWED
from tests.training.models import make_model, random_texts, step


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_both_kinds_of_model_hide_the_same_tokens(
    tiny_base: Callable[..., Path], family: str
) -> None:
    """With the adapter's B at 0, so that both are the base, with its special rows."""
    ids, lengths = pad(random_texts())
    seen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    seen[:, 0] = True
    adapter, _ = make_model(tiny_base(family), AdapterModel)
    dense, _ = make_model(tiny_base(family), DenseModel)
    for name, parameter in adapter.lm.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    with torch.no_grad():
        found = adapter.special_states(ids, lengths, seen)
        torch.testing.assert_close(
            found, dense.special_states(ids, lengths, seen), atol=1e-5, rtol=1e-4
        )
        # What is hidden may as well be another token.
        seen[:, 1:] = False
        other = ids.clone()
        other[:, 1:] = 7
        states = [adapter.special_states(each, lengths, seen) for each in (ids, other)]
        torch.testing.assert_close(*states)
        assert not torch.allclose(*(adapter.special_states(each, lengths) for each in (ids, other)))


def test_parts_of_a_batch_hide_the_same_tokens(tiny_base: Callable[..., Path]) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    ids, lengths = pad(random_texts((5, 31, 7, 18, 12, 9)))
    seen = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = model(torch.tensor(1.0), cl_ids=ids, cl_lengths=lengths, cl_seen=seen)["loss"]
    model.rows_per_pass = 2
    parts = model(torch.tensor(1.0), cl_ids=ids, cl_lengths=lengths, cl_seen=seen)["loss"]
    torch.testing.assert_close(parts, whole)


def test_packing_is_tight_and_undone() -> None:
    lengths = torch.tensor([5, 31, 1, 18, 12, 14, 32])
    packing = Packing.of(lengths, 32)
    assert packing.shape == (4, 32)  # 32, 31 + 1, 18 + 14, 12 + 5
    rows = torch.arange(7 * 40).view(7, 40) + 1
    real = torch.arange(40) < lengths[:, None]
    packed = packing.pack(rows)
    assert sorted(packed[packed > 0].tolist()) == sorted(rows[real].tolist())
    assert torch.equal(packing.unpack(packed, 40), rows.where(real, 0))
    assert Packing.of(lengths, 33, multiple_of=48).shape == (3, 48)  # 32 + 14 + 1, 31 + 12 + 5, 18


def test_rows_under_a_dense_mask_are_as_wide_as_is_cheapest() -> None:
    """Narrow where that fills them, wider where each would hold one text."""

    def shape(lengths: list[int]) -> tuple[int, int]:
        return Packing.for_dense_masks(torch.tensor(lengths)).shape

    assert shape([8, 24, 32] * 8) == (16, 32)  # 512 cells, all full
    assert shape([30] * 16 + [40]) == (4, 160)  # five of 30 to a row
    assert shape([400, *[20] * 20]) == (2, 448)
    assert shape([400]) == (1, 448)


@pytest.mark.parametrize("longest", [5, 60, 300])
def test_rows_under_a_dense_mask_come_in_few_sizes(longest: int) -> None:
    random = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(50):
        lengths = torch.randint(3, longest, (64,), generator=random)
        packing = Packing.for_dense_masks(lengths)
        rows = torch.ones(64, longest, dtype=torch.int64)
        assert packing.pack(rows).sum() == lengths.sum()
        sizes.add(packing.shape[0] * packing.shape[1])
    assert len(sizes) <= 8
    assert max(sizes) < 2 * min(sizes)


@pytest.mark.parametrize("family", [*FAMILIES, WINDOWED])
def test_packed_rows_give_the_same_losses_and_gradients(
    tiny_base: Callable[..., Path], family: str
) -> None:
    model, _ = make_model(tiny_base(family), DenseModel)
    found = []
    for width in (None, 48):
        model.pack_into = width
        found.append(step(model))
    (padded, expected), (packed, gradients) = found
    torch.testing.assert_close(packed["loss_cl"], padded["loss_cl"])
    torch.testing.assert_close(packed["loss_ntp"], padded["loss_ntp"])
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_flex_attention_gives_the_same_states(tiny_base: Callable[..., Path], family: str) -> None:
    """What CUDA computes with; on a CPU it has no gradients."""
    model, _ = make_model(tiny_base(family), DenseModel)
    ids, lengths = pad(random_texts((5, 31, 7, 18, 12, 9)))
    model.pack_into = 48
    with torch.no_grad():
        expected = model.special_states(ids, lengths)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DenseModel, "_flex", lambda self, packed: True)
            found = model.special_states(ids, lengths)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
