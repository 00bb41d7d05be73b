"""Whole runs on a tiny base: losses, resuming, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from gem_vllm.adapter_files import apply_adapter, extract_adapter
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.training.losses import MAX_LOG_TEMPERATURE
from gem_vllm.training.model_card import command_line
from gem_vllm.training.options import TrainOptions, compute_dtype
from gem_vllm.training.run import join_processes, make_trainer, train, training_arguments
from gem_vllm.training.run_folder import WHOLE, whole_checkpoints
from gem_vllm.weights import EMBEDDING
from tests.training.conftest import failing_at, losses, train_until

# Losses of `options`; a change of the trainer that moves them changes what is trained.
GOLDEN = {
    "adapter loss_ntp": [7.00445, 7.2094, 7.24783, 6.9745, 7.07193, 7.20203],
    "adapter loss_cl": [0.05986, 0.34543, 0.51112, 0.10336, 0.3571, 0.06407],
    "full loss_ntp": [7.05131, 7.19791, 7.07607, 6.88477, 6.95788, 7.03466],
    "full loss_cl": [0.05986, 0.29367, 0.56728, 0.17539, 0.45489, 0.07165],
    "lora loss_ntp": [7.05131, 7.22494, 7.13619, 7.0225, 7.06831, 7.17315],
    "lora loss_cl": [0.05986, 0.32018, 0.56715, 0.1494, 0.39833, 0.05845],
}


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


def test_the_temperature_stays_where_it_has_a_gradient(options: TrainOptions) -> None:
    options = dataclasses.replace(
        options, scale=100.0, contrastive_learning_rate=1.0, warmup_share=0.0, save_every=1
    )
    train_until(2, options)
    for checkpoint in whole_checkpoints(options.run_folder):
        state = load_file(checkpoint / "model.safetensors")
        assert state["log_temperature"] <= torch.tensor(MAX_LOG_TEMPERATURE)


def test_the_lora_is_where_it_was_asked_for(options: TrainOptions) -> None:
    options = dataclasses.replace(options, steps=1, lora_modules="mlp", lora_last_layers=1)
    train(options, progress=False)
    names = load_file(options.out / "gem_adapter" / "adapter_model.safetensors")
    targeted = {
        name.removeprefix("base_model.model.model.").rpartition(".lora_")[0] for name in names
    }
    assert targeted == {f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert torch.isfinite(ReferenceEmbedder(options.out).embed(["bread and water"])).all()
    with pytest.raises(GemError, match="--lora-last-layers is 9; the base has 2 layers"):
        train(dataclasses.replace(options, lora_last_layers=9), overwrite=True, progress=False)


def test_options_reach_what_trains(options: TrainOptions) -> None:
    """None of these is the model's default, or transformers' own."""
    options = dataclasses.replace(
        options,
        pooling="concat",
        scale=30.0,
        symmetric=True,
        matryoshka=(8, 32),
        rows_per_pass=3,
        lora_rank=3,
        lora_alpha=7,
        weight_decay=0.03,
        max_grad_norm=0.7,
        save_every=5,
        keep_checkpoints=4,
        log_every=2,
        seed=11,
    )
    trainer, *_ = make_trainer(options, progress=False)
    model, arguments = trainer.model, trainer.args
    assert (model.pooling, model.symmetric, model.matryoshka) == ("concat", True, (8, 32))
    assert model.rows_per_pass == 3
    assert model.log_temperature.item() == pytest.approx(math.log(30.0))
    lora = model.lm.peft_config["default"]
    assert (lora.r, lora.lora_alpha) == (3, 7)
    assert (arguments.max_steps, arguments.per_device_train_batch_size) == (6, 8)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.seed) == (0.03, 0.7, 11)
    assert (arguments.save_steps, arguments.save_total_limit, arguments.logging_steps) == (5, 4, 2)
    assert trainer.create_optimizer().param_groups[0]["weight_decay"] == 0.03


def test_an_instruction_is_trained_and_kept(options: TrainOptions) -> None:
    options = dataclasses.replace(options, steps=1, instruction=" In a word:")
    train(options, progress=False)
    config = GemConfig.from_pretrained(options.out)
    reference = ReferenceEmbedder(options.out)
    assert reference.tokenizer.decode(config.instruction_ids) == " In a word:"
    assert torch.isfinite(reference.embed(["bread and water"])).all()
    extract_adapter(options.out, options.out.with_name("adapter"))
    apply_adapter(options.base, options.out.with_name("adapter"), options.out.with_name("again"))
    assert GemConfig.from_pretrained(options.out.with_name("again")) == config


def test_matryoshka_sizes_are_in_the_checkpoint(options: TrainOptions) -> None:
    options = dataclasses.replace(options, steps=1, matryoshka=(8, 32))
    train(options, progress=False)
    config = GemConfig.from_pretrained(options.out)
    assert config.extra["matryoshka_dimensions"] == [8, 32]
    card = (options.out / "README.md").read_text().replace("\\\n    ", "")
    assert "--matryoshka 8 --matryoshka 32" in card
    with pytest.raises(GemError, match="--matryoshka is over an embedding's size, which is 64"):
        train(dataclasses.replace(options, matryoshka=(65,)), overwrite=True, progress=False)
    other = dataclasses.replace(options, matryoshka=(65,), out=options.out.with_name("other"))
    with pytest.raises(GemError, match="--matryoshka is over"):
        train(other, progress=False)
    assert not other.run_folder.exists(), "the corrected command needs no --overwrite"


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


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_only_where_a_gpu_computes_it(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones emulate it, and say that they support it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: including_emulation or units,
    )
    assert compute_dtype("auto") == (torch.bfloat16 if units else torch.float32)


def weight_change(options: TrainOptions) -> torch.Tensor:
    """float32 [n]: what a run added to its base's weights; of an adapter its B, from 0 on."""
    if options.mode == "adapter":
        lora = load_file(options.out / "gem_adapter" / "adapter_model.safetensors")
        return torch.cat([lora[name].flatten() for name in sorted(lora) if ".lora_B." in name])
    base, result = (
        load_file(folder / "model.safetensors") for folder in (options.base, options.out)
    )
    return torch.cat(
        [(result[name][: len(base[name])] - base[name]).flatten() for name in sorted(base)]
    )


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_bfloat16_learns_the_same(options: TrainOptions, mode: Any) -> None:
    options = dataclasses.replace(options, mode=mode, dtype="bfloat16", steps=3, raw_share=0.5)
    train(options, progress=False)
    found = losses(options)
    full = dataclasses.replace(options, dtype="float32", out=options.out.with_name("float32"))
    train(full, progress=False)
    for name, values in losses(full).items():
        assert found[name] == pytest.approx(values, rel=0.1, abs=0.05)
    learned, expected = weight_change(options), weight_change(full)
    assert not torch.equal(learned, expected), "it is computed in another dtype"
    assert torch.cosine_similarity(learned, expected, dim=0) > 0.8


def test_adapter_comes_apart_and_together(options: TrainOptions, tmp_path: Path) -> None:
    train(options, progress=False)
    extract_adapter(options.out, tmp_path / "adapter")
    apply_adapter(options.base, tmp_path / "adapter", tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == (options.out / "README.md").read_text()
    texts = ["bread and water", "an old map"]
    first, second = (ReferenceEmbedder(f).embed(texts) for f in (options.out, tmp_path / "again"))
    assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["adapter", "full", "lora"])
def test_resuming_gives_the_losses_of_an_uninterrupted_run(
    options: TrainOptions, tmp_path: Path, mode: Any
) -> None:
    options = dataclasses.replace(options, mode=mode)
    whole = dataclasses.replace(options, out=tmp_path / "whole")
    train(whole, progress=False)
    train_until(3, options)
    assert not options.out.exists()
    partial = options.run_folder / "checkpoint-3"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half a file")

    train(options, resume=True, progress=False)
    assert losses(options) == losses(whole)
    result, expected = (load_file(o.out / "model.safetensors") for o in (options, whole))
    assert all(torch.equal(result[name], expected[name]) for name in expected)


def test_checkpoints_of_an_adapter_hold_no_base(options: TrainOptions) -> None:
    train_until(5, options)
    checkpoints = whole_checkpoints(options.run_folder)
    assert [folder.name for folder in checkpoints] == ["checkpoint-2", "checkpoint-4"]
    state = load_file(checkpoints[-1] / "model.safetensors")
    assert not any(re.search(r"base_layer|norm|lm_head", name) for name in state)
    damaged = checkpoints[-1] / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (checkpoints[0] / WHOLE).unlink()
    assert not whole_checkpoints(options.run_folder)


def test_a_resumed_run_saves_as_often_as_it_is_told(options: TrainOptions) -> None:
    train_until(3, options)
    train_until(5, dataclasses.replace(options, save_every=1), resume=True)
    found = [folder.name for folder in whole_checkpoints(options.run_folder)]
    assert found == ["checkpoint-4", "checkpoint-5"]


def test_full_disk_is_said_and_survived(options: TrainOptions) -> None:
    full = failing_at(3, OSError(28, "No space left on device"))
    with full, pytest.raises(GemError, match=r"disk of .* is full; .* --resume"):
        train(options, progress=False)
    train(options, resume=True, progress=False)
    assert len(losses(options)["loss_cl"]) == options.steps


def test_a_full_disk_at_the_end_is_said_and_survived(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        no_room = Mock(side_effect=OSError(28, "No space left on device"))
        patch.setattr("gem_vllm.adapter.save_file", no_room)
        with pytest.raises(GemError, match=r"has no room left for .* continue with --resume"):
            train(options, progress=False)
    train(options, resume=True, progress=False)
    assert options.out.is_dir()
    assert len(losses(options)["loss_cl"]) == options.steps


def test_diverging_is_said(options: TrainOptions) -> None:
    options = dataclasses.replace(options, contrastive_learning_rate=1e18, warmup_share=0.0)
    with pytest.raises(GemError, match=r"loss is not finite at step \d"):
        train(options, progress=False)


def test_an_option_that_is_newer_than_a_run_had_its_default_there(options: TrainOptions) -> None:
    recorded = options.bound()
    del recorded["span_tokens"]
    assert options.difference(recorded) == []
    assert dataclasses.replace(options, span_tokens=32).difference(recorded) == ["span_tokens"]


def test_a_run_does_not_go_on_in_another_dtype(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(options, dtype="auto")
    there = torch.float32 if compute_dtype("auto") == torch.bfloat16 else torch.bfloat16
    with monkeypatch.context() as patch:
        patch.setattr("gem_vllm.training.options.compute_dtype", lambda _: there)
        recorded = options.bound()
    assert options.difference(recorded) == ["dtype"]
    assert options.difference(options.bound()) == []
    assert options.difference({**recorded, "dtype": "auto"}) == []  # as was told once


def test_temperature_and_special_tokens_do_not_decay(options: TrainOptions) -> None:
    options = dataclasses.replace(options, weight_decay=0.1)
    trainer, *_ = make_trainer(options, progress=False)
    decaying = trainer.get_decay_parameter_names(trainer.model)
    trained = {name for name, each in trainer.model.named_parameters() if each.requires_grad}
    left_out = {name.rpartition(".")[2] for name in trained.difference(decaying)}
    assert left_out == {"log_temperature", "default"}  # PEFT's name of special tokens' rows
    assert {name.rpartition(".lora_")[2] for name in trained.intersection(decaying)} == {
        "A.default.weight",
        "B.default.weight",
    }


def test_an_instruction_is_told_to_the_model(options: TrainOptions) -> None:
    options = dataclasses.replace(options, mode="full", instruction=" in one word:")
    trainer, _, gem_config = make_trainer(options, progress=False)
    assert trainer.model.instruction_tokens == len(gem_config.instruction_ids) > 0


def test_steps_of_a_schedule_that_has_none_do_not_differ(options: TrainOptions) -> None:
    recorded = {**options.bound(), "alpha_steps": 100}
    assert options.alpha_schedule == "constant"
    assert options.difference(recorded) == []
    assert "alpha_steps" in dataclasses.replace(options, alpha_schedule="linear").bound()


@pytest.mark.parametrize("positives", ["dropout", "masks"])
@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_cards_command_makes_this_run(
    positives: Any, rate: float, options: TrainOptions
) -> None:
    """Though the default of --drop-rate is another for masks."""
    options = dataclasses.replace(options, positives=positives, drop_rate=rate)
    command = command_line(options).replace("\\\n", " ").split()
    given = dict(pairwise(command))
    default = TrainOptions(
        base=options.base, data=options.data, out=options.out, positives=positives
    ).drop_rate
    assert float(given.get("--drop-rate", default)) == rate


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


def test_an_earlier_result_is_not_lost_by_mistake(
    options: TrainOptions, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options, progress=False)
    written = options.out.stat().st_mtime_ns
    with monkeypatch.context() as patch:  # no room is needed for what is there
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
        assert train(options, resume=True, progress=False) == options.out
    assert capsys.readouterr().err.endswith(f"{options.out}: already finished\n")
    assert options.out.stat().st_mtime_ns == written
    with pytest.raises(GemError, match="not empty; continue its run with --resume"):
        train(options, progress=False)
    shorter = dataclasses.replace(options, steps=3)
    with pytest.raises(GemError, match="these differ: --steps"):
        train(shorter, resume=True, progress=False)
    train(shorter, overwrite=True, progress=False)
    assert len(losses(shorter)["loss_cl"]) == 3
    shutil.rmtree(shorter.run_folder)
    written = options.out.stat().st_mtime_ns
    with pytest.raises(GemError, match="is there, but not the run that it is of"):
        train(shorter, resume=True, progress=False)
    assert options.out.stat().st_mtime_ns == written


def test_what_is_no_result_of_ours_is_never_overwritten(options: TrainOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.tex").touch()
    with pytest.raises(GemError, match="holds something else"):
        train(options, overwrite=True, progress=False)
    assert (options.out / "thesis.tex").exists()


@pytest.mark.parametrize("by", ["FSDP", "DEEPSPEED"])
def test_another_way_to_shard_is_refused(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{by}", "true")
    with pytest.raises(GemError, match=f"launch it without {by}, and give --shard"):
        join_processes()


@pytest.mark.parametrize(("mode", "bf16", "found"), [("full", True, "bf16"), ("full", False, "no"),
                                                     ("adapter", True, "no")])  # fmt: skip
def test_a_launchers_precision_does_not_count(
    mode: Any, bf16: bool, found: str, options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    arguments = training_arguments(dataclasses.replace(options, mode=mode), bf16=bf16)
    assert arguments.mixed_precision == found


def test_a_run_is_not_kept_in_its_base(options: TrainOptions) -> None:
    inside = dataclasses.replace(options, out=options.base / "gem")
    with pytest.raises(GemError, match=f"--out .* is in {options.base}, which is read"):
        train(inside, progress=False)
    assert not inside.run_folder.exists()


def test_options_are_recorded(options: TrainOptions) -> None:
    train(options, progress=False)
    recorded = json.loads((options.run_folder / "options.json").read_text())
    assert options.difference(recorded) == []
    assert options.difference(recorded | {"seed": 9, "save_every": 1}) == ["seed"]


def test_what_files_hold_is_recorded_and_not_where_they_are(
    options: TrainOptions, tmp_path: Path
) -> None:
    recorded = json.loads(json.dumps(options.bound()))
    texts, base = tmp_path / "moved.txt", shutil.copytree(options.base, tmp_path / "base")
    shutil.copy(options.data[0], texts)
    moved = dataclasses.replace(options, data=(str(texts),), base=base)
    assert moved.difference(recorded) == []
    texts.write_text(f"{texts.read_text()}another text\n")
    (base / "config.json").write_text("{}")
    assert moved.difference(recorded) == ["base", "data"]


def test_the_working_folder_has_a_name(options: TrainOptions) -> None:
    here = dataclasses.replace(options, out=Path("."))
    assert here.run_folder == Path.cwd().with_name(f"{Path.cwd().name}.run")
