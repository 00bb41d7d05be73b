"""The training forwards against the oracle: one pass under one dense mask, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gem_vllm.training.adapter_model import AdapterModel, special_rows
from gem_vllm.training.dense_model import DenseModel
from gem_vllm.training.losses import info_nce, leading, pool
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.sequences import IGNORE, next_token_targets, pad
from tests.tiny import FAMILIES, WINDOWED
from tests.training.models import K, make_model, random_texts
from tests.training.oracle import (
    assert_near,
    assert_same_adapter_gradients,
    make_oracle,
    oracle_ntp_loss,
    oracle_states,
    with_gradients,
)


@pytest.mark.parametrize("family", [*FAMILIES, WINDOWED])
def test_adapter_embeds_as_the_reference_does(
    tiny_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model, tokenizer = make_model(tiny_base(family), AdapterModel)
    oracle = make_oracle(model, tokenizer, tmp_path / "gem")
    texts = random_texts()
    with torch.no_grad():
        found = pool(model.special_states(*pad(texts)), "mean")
    torch.testing.assert_close(found, oracle.embed(texts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [*FAMILIES, WINDOWED])
def test_adapter_gradients_are_the_single_pass_ones(
    tiny_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model, tokenizer = make_model(tiny_base(family), AdapterModel)
    oracle = with_gradients(make_oracle(model, tokenizer, tmp_path / "gem"))
    texts, special = random_texts(), list(model.special_ids)
    direction = torch.randn(K, 64, generator=torch.Generator().manual_seed(1))
    (model.special_states(*pad(texts)) * direction).sum().backward()
    for text in texts:
        (oracle_states(oracle, text + special)[-K:] * direction).sum().backward()
    assert_same_adapter_gradients(model, oracle)


@pytest.mark.parametrize("family", [*FAMILIES, WINDOWED])
def test_adapter_ntp_loss_and_gradients_are_the_single_pass_ones(
    tiny_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model, tokenizer = make_model(tiny_base(family), AdapterModel)
    oracle = with_gradients(make_oracle(model, tokenizer, tmp_path / "gem"))
    special, texts = list(model.special_ids), random_texts()
    rows = [[*text, *special, *reversed(text)] for text in texts]
    raw = random_texts((40,))
    found = model.ntp_loss(*pad([*rows[:2], *raw, *rows[2:]]))
    expected = oracle_ntp_loss(oracle, rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward()
    expected.backward()
    assert_same_adapter_gradients(model, oracle)


@pytest.mark.parametrize("kind", [AdapterModel, DenseModel])
def test_logits_are_computed_a_part_at_a_time(
    tiny_base: Callable[..., Path], kind: type[GemTrainingModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = make_model(tiny_base(), kind)
    special, texts = list(model.special_ids), random_texts()
    rows = pad([[*text, *special, *reversed(text)] for text in texts])
    model.ntp_loss(*rows).backward()
    expected = {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }
    assert len(expected) > 1
    model.zero_grad()
    positions: list[int] = []
    logits = model.logits

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        positions.append(len(hidden))
        return logits(hidden)

    monkeypatch.setattr("gem_vllm.training.model.POSITIONS_AT_ONCE", 7)
    monkeypatch.setattr(model, "logits", counting)
    model.ntp_loss(*rows).backward()
    assert max(positions) == 7
    for name, gradient in expected.items():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_raw_text_alone_gives_the_adapter_nothing_to_learn(
    tiny_base: Callable[..., Path],
) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    ids, lengths = pad(random_texts())
    loss = model(torch.tensor(0.0), ntp_ids=ids, ntp_lengths=lengths)["loss"]
    assert loss.item() == 0.0
    loss.backward()
    assert not special_rows(model.lm).grad.any()


@pytest.mark.parametrize("contrastive", ["cl", "lex"])
def test_the_parts_are_weighed_by_alpha(tiny_base: Callable[..., Path], contrastive: str) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    texts, special = random_texts((9, 8, 12, 20)), list(model.special_ids)
    ids, lengths = pad(texts)
    ntp_ids, ntp_lengths = pad([[*text, *special, *text] for text in texts])
    batch = {f"{contrastive}_ids": ids, f"{contrastive}_lengths": lengths}
    if contrastive == "lex":
        similar = torch.rand(4, 4, generator=torch.Generator().manual_seed(1))
        batch["lex_similar"] = similar.fill_diagonal_(-torch.inf)
    losses = model(torch.tensor(0.25), ntp_ids=ntp_ids, ntp_lengths=ntp_lengths, **batch)
    assert losses.keys() == {"loss", "loss_ntp", f"loss_{contrastive}"}
    expected = 0.75 * losses["loss_ntp"] + 0.25 * losses[f"loss_{contrastive}"]
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", WINDOWED])
def test_dense_forward_is_the_reference(
    tiny_base: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model, tokenizer = make_model(tiny_base(family), DenseModel)
    oracle = make_oracle(model, tokenizer, tmp_path / "gem")
    texts, special = random_texts(), list(model.special_ids)
    with torch.no_grad():
        found = pool(model.special_states(*pad(texts)), "mean")
        torch.testing.assert_close(found, oracle.embed(texts), rtol=1e-4, atol=1e-5)
        rows = [[*text, *special, *reversed(text)] for text in texts]
        token_ids, lengths = pad(rows)
        targets = next_token_targets(token_ids, lengths, special)
        hidden, computed = model.ordinary_states(token_ids, lengths, targets != IGNORE)
        expected = torch.cat(
            [
                oracle.hidden_states(row)[mask[: len(row)]]
                for row, mask in zip(rows, computed, strict=True)
            ]
        )
        torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_is_trained_and_nothing_else(tiny_base: Callable[..., Path]) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    texts, special = random_texts((9, 8, 12, 20)), list(model.special_ids)
    cl_ids, cl_lengths = pad(texts)
    ntp_ids, ntp_lengths = pad([[*text, *special, *text] for text in texts])
    model(torch.tensor(0.5), cl_ids, cl_lengths, ntp_ids, ntp_lengths)["loss"].backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == model.state_dict().keys()
    assert all(
        name == "log_temperature" or "lora_" in name or "trainable_tokens_delta" in name
        for name in reached
    )
    trained_linears = {name.split(".lora_")[0] for name in reached if "lora_" in name}
    assert len(trained_linears) == 2 * 7, "all linear layers of both layers, not the head"


def test_contrastive_phase_computes_no_suffix_and_no_logits(
    tiny_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)

    def refuse(*_: Any) -> None:
        raise AssertionError("computed in the contrastive phase")

    monkeypatch.setattr(model, "_suffix_pass", refuse)
    monkeypatch.setattr(model, "logits", refuse)
    losses = model(torch.tensor(1.0), *pad(random_texts((9, 8, 12, 20))))
    assert losses.keys() == {"loss", "loss_cl"}


def test_nothing_is_kept_for_a_backward_pass_through_the_prefix(
    tiny_base: Callable[..., Path],
) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    prefix = model.prefix_pass(*pad(random_texts()))
    assert not prefix.keys.requires_grad
    assert not prefix.values.requires_grad


def test_a_prefix_is_computed_up_to_the_last_keys_and_values(
    tiny_base: Callable[..., Path],
) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    last = model.base.get_decoder().layers[-1]
    mlp, read = last.mlp, []
    mlp.register_forward_hook(lambda *_: read.append("mlp"))
    ids, lengths = pad(random_texts())
    prefix = model.prefix_pass(ids, lengths)
    assert not read
    assert last.mlp is mlp
    with torch.no_grad(), model.lm.disable_adapter():
        whole = model.base(input_ids=ids, use_cache=True).past_key_values
    for i, layer in enumerate(whole.layers):
        for row, length in enumerate(lengths.tolist()):
            torch.testing.assert_close(prefix.keys[i, row, :, :length], layer.keys[row, :, :length])
            torch.testing.assert_close(
                prefix.values[i, row, :, :length], layer.values[row, :, :length]
            )


def test_the_prefix_is_read_where_it_lies(tiny_base: Callable[..., Path]) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    ids, lengths = pad(random_texts())
    prefix = model.prefix_pass(ids, lengths)
    layers = [*prefix.keys, *prefix.values]
    lie = {part.data_ptr() for part in layers}
    kept: list[int] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.numel() >= layers[0].numel() and ids.shape[1] in saved.shape:
            kept.append(saved.data_ptr())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        model.special_pass(prefix, lengths)
    assert set(kept) == lie
    assert prefix.keys.shape[3] == prefix.values.shape[3] == prefix.length == ids.shape[1]


def test_a_base_with_dropout_is_computed_without(tiny_base: Callable[..., Path]) -> None:
    model, _ = make_model(tiny_base("llama", attention_dropout=0.5), AdapterModel)
    model.train()
    texts = pad(random_texts())
    assert torch.equal(model.special_states(*texts), model.special_states(*texts))


def test_state_is_what_is_trained(tiny_base: Callable[..., Path]) -> None:
    model, _ = make_model(tiny_base(), AdapterModel)
    other, _ = make_model(tiny_base(), AdapterModel)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    other.load_state_dict(state)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in state.items())
    with pytest.raises(ValueError, match="other parameters"):
        other.load_state_dict({})


@pytest.mark.parametrize("kind", [AdapterModel, DenseModel])
def test_parts_of_a_batch_give_the_same_gradients_and_keep_nothing(
    kind: type[GemTrainingModel], tiny_base: Callable[..., Path]
) -> None:
    """What is kept for the backward pass does not grow with the batch, but for its input."""

    def run(texts: int, rows_per_pass: int | None) -> tuple[float, dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model, _ = make_model(tiny_base("llama"), kind)
        model.rows_per_pass = rows_per_pass
        ids, lengths = pad(random_texts((31, 12, 5, 18) * (texts // 4)))
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(torch.tensor(1.0), cl_ids=ids, cl_lengths=lengths)["loss"]
        loss.backward()
        gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        return loss.item(), gradients, sum(kept.values())

    loss, gradients, whole = run(16, None)
    in_parts, same_gradients, kept = run(16, 4)
    assert in_parts == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        assert_near(same_gradients[name], gradient, name)
    twice = run(32, 4)[2]
    assert kept < whole / 4
    assert twice - kept < (run(32, None)[2] - whole) / 8


@pytest.mark.parametrize("symmetric", [False, True])
def test_negatives_of_labelled_pairs_count(tiny_base: Callable[..., Path], symmetric: bool) -> None:
    model, _ = make_model(tiny_base("llama"), AdapterModel)
    model.symmetric = symmetric
    ids, lengths = pad(random_texts((31, 12, 5, 18, 9)))
    batch = {"alpha": torch.tensor(1.0), "cl_ids": ids, "cl_lengths": lengths}
    found = model(**batch, cl_pairs=torch.tensor(2))["loss"]
    pooled = pool(model.special_states(ids, lengths), "mean")
    anchors, positives, negatives = pooled[:2], pooled[2:4], pooled[4:]
    expected = info_nce(
        anchors, positives, model.log_temperature, symmetric=symmetric, negatives=negatives
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [AdapterModel, DenseModel])
def test_matryoshka_is_the_mean_over_the_sizes(
    tiny_base: Callable[..., Path], kind: type[GemTrainingModel]
) -> None:
    model, _ = make_model(tiny_base(), kind)
    ids, lengths = pad(random_texts((5, 31, 7, 18, 12, 9)))
    with torch.no_grad():
        pooled = pool(model.special_states(ids, lengths), "mean")
        expected = [
            info_nce(
                leading(pooled[:3], size),
                leading(pooled[3:], size),
                model.log_temperature,
                symmetric=False,
            )
            for size in (None, 16, 4)
        ]
        model.matryoshka = (16, 4)
        found = model(torch.tensor(1.0), cl_ids=ids, cl_lengths=lengths)["loss_cl"]
    torch.testing.assert_close(found, sum(expected) / 3)
