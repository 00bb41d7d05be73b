"""Whole runs on a tiny base: losses, resuming, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gem_vllm.adapter import apply_adapter, extract_adapter
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import train
from gem_vllm.training.trainer import WHOLE, GemTrainer, whole_checkpoints
from gem_vllm.weights import EMBEDDING

# Losses of `options` below; a change of the trainer that moves them changes what is trained.
GOLDEN = {
    "adapter loss_ntp": [7.00445, 7.2094, 7.24783, 6.9745, 7.07193, 7.20203],
    "adapter loss_cl": [0.05986, 0.34543, 0.51112, 0.10336, 0.3571, 0.06407],
    "full loss_ntp": [7.05131, 7.19791, 7.07607, 6.88477, 6.95788, 7.03466],
    "full loss_cl": [0.05986, 0.29367, 0.56728, 0.17539, 0.45489, 0.07165],
    "lora loss_ntp": [7.05131, 7.22494, 7.13619, 7.0225, 7.06831, 7.17315],
    "lora loss_cl": [0.05986, 0.32018, 0.56715, 0.1494, 0.39833, 0.05845],
}


@pytest.fixture
def options(tiny_base: Callable[..., Path], texts: Path, tmp_path: Path) -> TrainOptions:
    """Six steps that go through both phases' losses at once (alpha 0.5)."""
    return TrainOptions(
        base=tiny_base(),
        data=(str(texts),),
        out=tmp_path / "gem",
        special_tokens=2,
        steps=6,
        batch_size=8,
        alpha_schedule="constant",
        alpha=0.5,
        lora_rank=4,
        lora_alpha=8,
        save_every=2,
        dtype="float32",
    )


def losses(options: TrainOptions) -> dict[str, list[float]]:
    """The losses that the run logged for TensorBoard, by name, a value a step."""
    by_step: dict[str, dict[int, float]] = {}
    for folder in sorted((options.run_folder / "runs").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in ("loss_ntp", "loss_cl"):
            if f"train/{name}" in events.Tags()["scalars"]:
                for event in events.Scalars(f"train/{name}"):
                    by_step.setdefault(name, {})[event.step] = event.value
    return {name: [values[step] for step in sorted(values)] for name, values in by_step.items()}


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_golden_losses(options: TrainOptions, mode: Any) -> None:
    options = dataclasses.replace(
        options,
        mode=mode,
        raw_share=0.0 if mode == "adapter" else 0.5,
        contrastive_learning_rate=1e-3,
        ntp_learning_rate=1e-3,
    )
    train(options, progress=False)
    found = losses(options)
    for name in ("loss_ntp", "loss_cl"):
        assert found[name] == pytest.approx(GOLDEN[f"{mode} {name}"], abs=1e-4)


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_result_is_a_checkpoint_of_its_mode(options: TrainOptions, mode: Any) -> None:
    options = dataclasses.replace(options, mode=mode, pooling="concat", steps=2)
    assert train(options, progress=False) == options.out
    config = GemConfig.from_pretrained(options.out)
    assert (config.k, config.pooling, config.train_mode) == (2, "concat", mode)
    embeddings = ReferenceEmbedder(options.out).embed(["bread and water", "an old map"])
    assert embeddings.shape == (2, 128)
    assert torch.isfinite(embeddings).all()

    base = load_file(options.base / "model.safetensors")
    result = load_file(options.out / "model.safetensors")
    rows = len(base[EMBEDDING])
    result[EMBEDDING] = result[EMBEDDING][:rows]
    same = {name for name in base if torch.equal(base[name], result[name])}
    if mode == "adapter":
        assert same == base.keys(), "the frozen base, bit for bit"
    elif mode == "lora":
        assert same == {name for name in base if "norm" in name or name == EMBEDDING}
    else:
        assert not same
    assert not list(options.run_folder.glob("checkpoint-*"))


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_bfloat16_learns_the_same(options: TrainOptions, mode: Any) -> None:
    options = dataclasses.replace(options, mode=mode, dtype="bfloat16", steps=3, raw_share=0.5)
    train(options, progress=False)
    found = losses(options)
    full = dataclasses.replace(options, dtype="float32", out=options.out.with_name("float32"))
    train(full, progress=False)
    for name, values in losses(full).items():
        assert found[name] == pytest.approx(values, rel=0.1, abs=0.05)


def test_adapter_comes_apart_and_together(options: TrainOptions, tmp_path: Path) -> None:
    train(options, progress=False)
    extract_adapter(options.out, tmp_path / "adapter")
    apply_adapter(options.base, tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (options.out / "README.md").read_text()
    texts = ["bread and water", "an old map"]
    first, second = (ReferenceEmbedder(f).embed(texts) for f in (options.out, tmp_path / "again"))
    assert torch.equal(first, second)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    compute_loss = GemTrainer.compute_loss

    def interrupted(self: GemTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise error
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(GemTrainer, "compute_loss", interrupted)


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    options = dataclasses.replace(options, mode=mode)
    whole = dataclasses.replace(options, out=tmp_path / "whole")
    train(whole, progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train(options, progress=False)
    assert not options.out.exists()
    partial = options.run_folder / "checkpoint-3"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half a file")

    train(options, resume=True, progress=False)
    assert losses(options) == losses(whole)
    result, expected = (load_file(o.out / "model.safetensors") for o in (options, whole))
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_checkpoints_of_an_adapter_hold_no_base(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_at(5, monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train(options, progress=False)
    checkpoints = whole_checkpoints(options.run_folder)
    assert [folder.name for folder in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    state = load_file(checkpoints[-1] / "model.safetensors")
    assert not any(re.search(r"base_layer|norm|lm_head", name) for name in state)
    damaged = checkpoints[-1] / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (checkpoints[0] / WHOLE).unlink()
    assert not whole_checkpoints(options.run_folder)


def test_a_resumed_run_saves_as_often_as_it_is_told(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, save_every, resume in ((3, 2, False), (5, 1, True)):
        with monkeypatch.context() as patch:
            interrupt_at(step, patch, KeyboardInterrupt())
            run = dataclasses.replace(options, save_every=save_every)
            with pytest.raises(KeyboardInterrupt):
                train(run, resume=resume, progress=False)
    found = [folder.name for folder in whole_checkpoints(options.run_folder)]
    assert found == ["checkpoint-4", "checkpoint-5"]


def test_full_disk_is_said_and_survived(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(3, patch, OSError(28, "No space left on device"))
        with pytest.raises(GemError, match=r"disk of .* is full; .* --resume"):
            train(options, progress=False)
    train(options, resume=True, progress=False)
    assert len(losses(options)["loss_cl"]) == options.steps


def test_diverging_is_said(options: TrainOptions) -> None:
    options = dataclasses.replace(options, contrastive_learning_rate=1e18, warmup_share=0.0)
    with pytest.raises(GemError, match=r"loss is not finite at step \d"):
        train(options, progress=False)


def test_model_card(options: TrainOptions) -> None:
    train(options, progress=False)
    card = (options.out / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "texts.txt" in card
    assert re.search(r"Next-token loss \| \d+\.\d+ at first, \d+\.\d+ in the end", card)
    assert re.search(r"Contrastive loss \| \d+\.\d+ at first", card)
    command = " ".join(re.search(r"```\n(.*?)\n```", card, re.S)[1].split())
    assert command.startswith(
        "gem-vllm train --base base --data texts.txt --out gem --mode adapter"
    )
    assert "--alpha 0.5" in command
    assert str(options.base.parent) not in card


@pytest.fixture
def pairs(texts: Path, tmp_path: Path) -> Path:
    """30 pairs of texts; their scores say nothing, so the best checkpoint is any of them."""
    lines = texts.read_text().splitlines()
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"sentence1": lines[i], "sentence2": lines[i + 30], "score": (7 * i) % 11}
        for i in range(30)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("rate", [1e-3, 0.3], ids=["better", "worse"])
def test_the_best_checkpoint_on_held_out_pairs_is_the_result(
    options: TrainOptions,
    pairs: Path,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    interrupted: bool,
) -> None:
    options = dataclasses.replace(
        options,
        held_out_pairs=str(pairs),
        save_every=4,
        contrastive_learning_rate=rate,
        ntp_learning_rate=rate,
    )
    if interrupted:
        with monkeypatch.context() as patch:
            interrupt_at(5, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                train(options, progress=False)
    train(options, resume=interrupted, progress=False)

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    embedder = ReferenceEmbedder(options.out)
    first, second = (embedder.embed([row[f"sentence{side}"] for row in rows]) for side in (1, 2))
    cosines, scores = (first * second).sum(dim=-1).numpy(), np.array([r["score"] for r in rows])
    ranks = [((v[:, None] > v) + 0.5 * (v[:, None] == v)).sum(axis=1) for v in (cosines, scores)]
    found = np.corrcoef(ranks)[0, 1]
    card = (options.out / "README.md").read_text()
    best, step, count = re.search(
        r"pairs.jsonl`: Spearman (-?[\d.]+) at step (\d), the best of (\d)", card
    ).groups()
    assert found == pytest.approx(float(best), abs=2e-3)
    assert (step, count) in {("4", "2"), ("6", "2")}
    assert "--held-out-pairs pairs.jsonl" in " ".join(card.split())
    assert "--save-every 4" in card


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_no_longer_gets_better_stops(
    options: TrainOptions, pairs: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    options = dataclasses.replace(
        options,
        held_out_pairs=str(pairs),
        patience=2,
        save_every=1,
        steps=8,
        contrastive_learning_rate=1e-12,
        ntp_learning_rate=1e-12,
    )
    if interrupted:
        with monkeypatch.context() as patch:
            interrupt_at(2, patch, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                train(options, progress=False)
    train(options, resume=interrupted, progress=False)
    assert len(losses(options)["loss_cl"]) == 3, "the second and the third are no better"
    card = (options.out / "README.md").read_text()
    assert "| Steps | 3 of 8 texts; 8 were planned |" in card
    with pytest.raises(GemError, match="needs --held-out-pairs"):
        dataclasses.replace(options, held_out_pairs=None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("no json", "line 1: not a JSON object"),
        ('{"sentence1": "a", "sentence2": "b"}', "line 1: expected an object with sentence1"),
        ('{"sentence1": "a", "sentence2": "b", "score": "x"}', "line 1: .* score is a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": 1}\n' * 2, "scores that differ"),
        ("", "scores that differ"),
    ],
)
def test_bad_held_out_pairs_are_refused(
    options: TrainOptions, tmp_path: Path, lines: str, message: str
) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(lines)
    with pytest.raises(GemError, match=message):
        train(dataclasses.replace(options, held_out_pairs=str(file)), progress=False)
    assert not options.run_folder.exists(), "the corrected command needs no --overwrite"
    with pytest.raises(GemError, match=r"give a .jsonl or .jsonl.gz file"):
        train(dataclasses.replace(options, held_out_pairs="absent.jsonl"), progress=False)


def test_an_earlier_result_is_not_lost_by_mistake(options: TrainOptions) -> None:
    train(options, progress=False)
    with pytest.raises(GemError, match="not empty; continue its run with --resume"):
        train(options, progress=False)
    shorter = dataclasses.replace(options, steps=3)
    with pytest.raises(GemError, match="these differ: --steps"):
        train(shorter, resume=True, progress=False)
    train(shorter, overwrite=True, progress=False)
    assert len(losses(shorter)["loss_cl"]) == 3


def test_what_is_no_result_of_ours_is_never_overwritten(options: TrainOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.tex").touch()
    with pytest.raises(GemError, match="holds something else"):
        train(options, overwrite=True, progress=False)
    assert (options.out / "thesis.tex").exists()


def test_options_are_recorded(options: TrainOptions) -> None:
    train(options, progress=False)
    recorded = json.loads((options.run_folder / "options.json").read_text())
    assert options.difference(recorded) == []
    assert options.difference(recorded | {"seed": 9, "save_every": 1}) == ["seed"]
