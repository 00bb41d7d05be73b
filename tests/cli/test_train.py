"""`gem-vllm train` as a user meets it: what is refused, with which words, and exit code 2."""

from __future__ import annotations

import dataclasses
import inspect
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gem_vllm import cli
from gem_vllm.commands.train import train
from gem_vllm.training.model_card import option_words
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run_folder import whole_checkpoints


@pytest.fixture
def run(
    tiny_base: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[int, str]]:
    """Run the command with good arguments, changed as told; exit code and standard error."""
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"text {i}: the lazy dog of the old stone bridge\n" for i in range(40)))

    def run_command(*extra: str, **changes: str) -> tuple[int, str]:
        arguments = {
            "base": str(tiny_base()),
            "data": str(data),
            "out": str(tmp_path / "gem"),
            "steps": "2",
            "batch-size": "4",
            **{name.replace("_", "-"): value for name, value in changes.items()},
        }
        words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
        monkeypatch.setattr(sys, "argv", ["gem-vllm", "train", *words, *extra])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0), capsys.readouterr().err

    return run_command


def test_trains(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    code, _ = run()
    assert code == 0
    assert (tmp_path / "gem" / "gem_adapter" / "adapter_model.safetensors").is_file()
    code, error = run()
    assert code == 2
    assert "not empty" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "nowhere"}, "--base nowhere is not a folder"),
        ({"data": "nowhere.txt"}, "--data nowhere.txt does not exist"),
        ({"special_tokens": "0"}, "--special-tokens must be from 1 to 64"),
        ({"special_tokens": "65"}, "--special-tokens must be from 1 to 64"),
        ({"steps": "0"}, "--steps must be at least 1"),
        ({"batch_size": "1"}, "--batch-size must be at least 2"),
        ({"batch_size": "64"}, "holds 40 texts of at least 8 tokens"),
        ({"drop_rate": "1.0"}, "--drop-rate must be between 0 and 1"),
        ({"raw_share": "1.5"}, "--raw-share must be from 0 to 1"),
        ({"alpha": "-0.1"}, "--alpha must be from 0 to 1"),
        ({"max_tokens": "9999"}, "over the base's context of 512"),
        ({"contrastive_learning_rate": "0"}, "--contrastive-learning-rate must be greater than 0"),
        ({"mode": "adaptor"}, "adaptor"),
        ({"matryoshka": "0"}, "--matryoshka must be at least 1"),
        ({"lora_last_layers": "0"}, "--lora-last-layers must be at least 1"),
        ({"span_tokens": "7"}, "--span-tokens must be at least 8"),
        ({"mode": "lora", "alpha_steps": "4"}, "--alpha-steps 4 are all of --steps 2"),
        ({"out": "/"}, "--out / cannot be replaced; name a folder inside it"),
        ({"out": "o" * 300}, "is too long; choose a shorter one"),
        ({"base": "b" * 300}, "is not a folder; name a model folder here"),
        ({"data": f"{'d' * 300}.txt"}, "does not exist; give a .txt"),
        ({"pairs": f"{'p' * 300}.jsonl"}, "give a .jsonl or .jsonl.gz file"),
        ({"held_out_pairs": f"{'p' * 300}.jsonl"}, "give a .jsonl or .jsonl.gz file"),
        ({"seed": "-1"}, "--seed must be from 0 to 4294967295"),
        ({"seed": "4294967296"}, "--seed must be from 0 to 4294967295"),
        ({"ntp_learning_rate": "inf"}, "--ntp-learning-rate must be greater than 0, and finite"),
        ({"contrastive_learning_rate": "nan"}, "--contrastive-learning-rate must be greater than"),
        ({"max_grad_norm": "nan"}, "--max-grad-norm must be greater than 0, and finite"),
        ({"max_grad_norm": "inf"}, "--max-grad-norm must be greater than 0, and finite"),
        ({"weight_decay": "nan"}, "--weight-decay must be at least 0, and finite"),
        ({"weight_decay": "inf"}, "--weight-decay must be at least 0, and finite"),
        ({"weight_decay": "-0.1"}, "--weight-decay must be at least 0, and finite"),
        ({"alpha": "0", "raw_share": "1"}, "--alpha 0 with --raw-share 1 trains nothing"),
        ({"alpha": "0", "pairs": "pairs.jsonl"}, "with --alpha 0 there are none"),
        (
            {"alpha": "0", "lexical_share": "1", "batch_size": "8"},
            "--lexical-share: for contrastive",
        ),
        ({"alpha": "0", "matryoshka": "8"}, "--matryoshka: for contrastive steps"),
        (
            {"pairs": "pairs.jsonl", "pairs_share": "0"},
            "--pairs with --pairs-share 0 are never read",
        ),
        (
            {"pairs": "p.jsonl", "pairs_share": "0.5", "lexical_share": "0.6", "batch_size": "8"},
            "--pairs-share 0.5 and --lexical-share 0.6 together must be at most 1",
        ),
    ],
)
def test_bad_input_is_refused_in_a_line(
    run: Callable[..., tuple[int, str]], tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    code, error = run(**changes)
    assert code == 2
    assert message in " ".join(error.split())
    assert not (tmp_path / "gem").exists()
    assert not list(tmp_path.glob("gem.run/checkpoint-*"))


def test_a_mix_of_more_than_two_sources_is_refused(run: Callable[..., tuple[int, str]]) -> None:
    code, error = run("--data", "b.txt", "--data", "c.txt", positives="mix")
    assert code == 2
    assert "--positives mix reads two --data, and 3 are given" in error


def test_text_field_that_is_not_there(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"body": "a text"}\n')
    code, error = run(data=str(data))
    assert code == 2
    assert "line 1: no field 'text'; choose one by --text-field (here: body)" in error


def test_resume_and_overwrite_exclude_each_other(run: Callable[..., tuple[int, str]]) -> None:
    code, error = run("--resume", "--overwrite")
    assert code == 2
    assert "not both" in error


def test_defaults_are_those_of_the_options() -> None:
    fields = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    command = inspect.signature(train).parameters
    assert fields.keys() == command.keys() - {"resume", "overwrite"}
    for name, default in fields.items():
        if default is not dataclasses.MISSING:
            # An option that can be given several times has the default None on a command line.
            assert command[name].default == (None if default == () else default), name


# A value of each option that is no default, and no other option's value.
TOLD: dict[str, Any] = {
    "base": Path("base"),
    "data": ("a.txt", "b.txt"),
    "out": Path("/nowhere/gem"),
    "mode": "lora",
    "special_tokens": 3,
    "pooling": "concat",
    "instruction": " in a word:",
    "text_field": "body",
    "pairs": "pairs.jsonl",
    "pairs_share": 0.31,
    "held_out_pairs": "held-out.jsonl",
    "patience": 4,
    "steps": 500,
    "batch_size": 16,
    "max_tokens": 300,
    "seed": 7,
    "dtype": "bfloat16",
    "raw_share": 0.61,
    "reconstruction_share": 0.35,
    "ntp_learning_rate": 2e-4,
    "positives": "mix",
    "drop_rate": 0.45,
    "anchor_drop_rate": 0.15,
    "span_share": 0.22,
    "span_tokens": 40,
    "cloze_share": 0.33,
    "lexical_share": 0.12,
    "teacher": Path("teacher"),
    "stemmer": "german",
    "scale": 30.0,
    "symmetric": True,
    "matryoshka": (8, 32),
    "rows_per_pass": 5,
    "packing": False,
    "shard": True,
    "contrastive_learning_rate": 3e-4,
    "alpha_schedule": "linear",
    "alpha": 0.9,
    "alpha_steps": 11,
    "warmup_share": 0.17,
    "weight_decay": 0.02,
    "max_grad_norm": 0.7,
    "lora_rank": 6,
    "lora_alpha": 9,
    "lora_modules": "mlp",
    "lora_last_layers": 2,
    "save_every": 13,
    "keep_checkpoints": 10,
    "log_every": 12,
}


# Each excludes the other.
@pytest.mark.parametrize(("left_out", "more"), [("shard", "resume"), ("teacher", "overwrite")])
def test_every_option_is_passed_on(
    left_out: str, more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(TrainOptions)}
    assert TOLD.keys() == defaults.keys()
    assert not [name for name, default in defaults.items() if TOLD[name] == default]
    values = {name: value for name, value in TOLD.items() if name != left_out}
    words = [
        word
        for name, value in values.items()
        for each in (value if isinstance(value, tuple) else (value,))
        for word in option_words(name, each)
    ]
    calls: list[tuple[TrainOptions, dict[str, bool]]] = []

    def noted(options: TrainOptions, **flags: bool) -> Path:
        calls.append((options, flags))
        return options.out

    monkeypatch.setattr("gem_vllm.training.run.train", noted)
    monkeypatch.setattr(sys, "argv", ["gem-vllm", "train", *words, f"--{more}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    flags = {name: name == more for name in ("resume", "overwrite")}
    assert calls == [(TrainOptions(**values), flags)]


def test_ctrl_c_leaves_a_checkpoint_to_continue_from(
    tiny_base: Callable[..., Path], tmp_path: Path
) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("".join(f"text {i}: the lazy dog of the old stone bridge\n" for i in range(40)))
    command = [sys.executable, "-m", "gem_vllm.cli", "train", "--base", str(tiny_base())]
    command += ["--data", str(data), "--out", str(tmp_path / "gem"), "--batch-size", "4"]
    command += ["--steps", "100000", "--save-every", "5"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not whole_checkpoints(tmp_path / "gem.run"):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == (
        f"interrupted; the checkpoints are in {tmp_path / 'gem.run'}: continue with --resume"
    )
    assert whole_checkpoints(tmp_path / "gem.run")
