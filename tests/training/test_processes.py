"""Two processes train as one does: the same losses, the same weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.model_card import option_words
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import _check_same_dtype, _check_same_step, train
from tests.training.conftest import losses, short_options, train_until

PROCESSES = 2


ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = [
    *("-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"),
    f"--nproc-per-node={PROCESSES}",
]


def launch(options: TrainOptions, *extra: str) -> subprocess.CompletedProcess[str]:
    """The command line in several processes, on the CPU."""
    words = list(extra)
    defaults = TrainOptions(
        base=options.base, data=options.data, out=options.out, mode=options.mode
    )
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("base", "data", "out", "mode") or value != getattr(defaults, field.name):
            for each in value if isinstance(value, tuple) else (value,):
                words += option_words(field.name, each)
    return run(*TORCHRUN, "-m", "gem_vllm.cli", "train", *words)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=500, cwd=ROOT
    )


def weights(options: TrainOptions) -> dict[str, torch.Tensor]:
    folder = options.out / "gem_adapter" if options.mode == "adapter" else options.out
    return load_file(next(iter(sorted(folder.glob("*.safetensors")))))


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    """A file of 20 labelled pairs, with none to twelve negatives."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                {
                    "anchor": f"the old river {number % 7} of the city",
                    "positive": f"a stone bridge {number}",
                    "negative": ["bread and flour"] * (number % 3 * 6),
                }
            )
            + "\n"
            for number in range(20)
        )
    )
    return str(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"symmetric": True, "matryoshka": (16,)},
        {"positives": "masks", "rows_per_pass": 3},
        {"lexical_share": 0.5, "pairs_share": 0.25, "matryoshka": (16,)},
        {"mode": "full", "raw_share": 0.5},
    ],
    ids=["adapter", "masks", "lexical", "full"],
)
def test_two_processes_train_as_one(
    options: TrainOptions, changes: dict[str, Any], pairs: str, tmp_path: Path
) -> None:
    changes = {"pairs_share": 0.5, **changes}
    options = dataclasses.replace(options, pairs=pairs, contrastive_learning_rate=1e-3, **changes)
    train(options, progress=False)
    together = dataclasses.replace(options, out=tmp_path / "together")
    done = launch(together)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = losses(options), losses(together)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=1e-3)
    contrastive = len(found["loss_cl"]) + len(found.get("loss_lex", ()))
    assert len(found["loss_ntp"]) == contrastive == options.steps
    for name, value in weights(options).items():
        torch.testing.assert_close(weights(together)[name], value, atol=2e-3, rtol=1e-2)
    assert (
        f"{options.pairs_share:.0%} of the batches are of `pairs.jsonl`"
        in (together.out / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs_share": 0.5},
        {"raw_share": 0.8, "batch_size": 4},
        {"mode": "lora", "raw_share": 0.5},
        {"mode": "full", "raw_share": 0.5, "alpha_schedule": "linear", "alpha_steps": 4},
        {"mode": "full", "rows_per_pass": 3, "max_grad_norm": 0.1, "pairs_share": 0.5},
    ],
    ids=["adapter", "adapter-raw", "lora", "full", "full-in-parts"],
)
def test_a_sharded_base_gives_the_same(
    options: TrainOptions, changes: dict[str, Any], pairs: str, tmp_path: Path
) -> None:
    """Also where processes have different numbers of rows: negatives, and rows that are split."""
    if "pairs_share" in changes:
        changes = {**changes, "pairs": pairs}
    scored = tmp_path / "scored.jsonl"
    scored.write_text(
        "".join(
            json.dumps({"sentence1": f"bread {n}", "sentence2": f"river {n * n}", "score": n})
            + "\n"
            for n in range(9)
        )
    )
    options = dataclasses.replace(
        options,
        contrastive_learning_rate=1e-3,
        held_out_pairs=str(scored),
        save_every=3,
        **changes,
    )
    train(options, progress=False)
    together = dataclasses.replace(options, out=tmp_path / "together", shard=True)
    done = launch(together)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, values in losses(options).items():
        assert losses(together)[name] == pytest.approx(values, abs=1e-3)
    for name, value in weights(options).items():
        torch.testing.assert_close(weights(together)[name], value, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_each_process_holds_its_part_of_a_sharded_base(options: TrainOptions, mode: str) -> None:
    arguments = (str(options.base), *options.data, str(options.out), mode)
    done = run(*TORCHRUN, "-m", "tests.training.held_by_each", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == pytest.approx(1 / PROCESSES, abs=0.01)


def test_one_process_has_nothing_to_shard(options: TrainOptions) -> None:
    with pytest.raises(GemError, match="start several by torchrun"):
        train(dataclasses.replace(options, shard=True), progress=False)
    assert not options.out.exists()


@pytest.mark.parametrize("changes", [{}, {"mode": "full", "shard": True}], ids=["adapter", "full"])
def test_an_interrupted_run_goes_on_in_both(
    options: TrainOptions, changes: dict[str, Any], tmp_path: Path
) -> None:
    half = dataclasses.replace(options, **changes)
    alone = dataclasses.replace(half, shard=False)
    whole = dataclasses.replace(alone, out=tmp_path / "whole")
    train(whole, progress=False)
    # Interrupted: its last checkpoint is there, and its result is not.
    train_until(5, alone)
    done = launch(half, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "continuing from step 4" in done.stderr
    assert losses(half)["loss_cl"] == pytest.approx(losses(whole)["loss_cl"], abs=1e-3)


def test_a_sharded_run_goes_on_in_one_process(options: TrainOptions, tmp_path: Path) -> None:
    options = short_options(options.base, Path(options.data[0]), options.out, mode="full")
    whole = dataclasses.replace(options, out=tmp_path / "whole")
    train(whole, progress=False)
    arguments = (str(options.base), *options.data, str(options.out))
    done = run(*TORCHRUN, "-m", "tests.training.sharded_run", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not options.out.exists()
    train(options, resume=True, progress=False)
    for name, values in losses(whole).items():
        assert losses(options)[name] == pytest.approx(values, abs=1e-3)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(options)[name], value, atol=1e-5, rtol=1e-2)


def test_a_process_without_the_others_checkpoint_ends(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on nodes that do not share the run's folder: they would go on from different steps."""
    monkeypatch.setattr(peers, "count", lambda: 2)
    monkeypatch.setattr(peers, "largest", lambda step, device: max(step, 4))
    _check_same_step(4, options, torch.device("cpu"))
    with pytest.raises(GemError, match=r"process 0 finds no checkpoint of step 4 in .*\.run; all"):
        _check_same_step(0, options, torch.device("cpu"))


def test_processes_that_compute_in_other_dtypes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where --dtype auto finds units for bfloat16 on one node, and none on another."""
    monkeypatch.setattr(peers, "count", lambda: 2)
    monkeypatch.setattr(peers, "largest", lambda bits, device: max(bits, 32))
    _check_same_dtype(torch.float32, torch.device("cpu"))
    with pytest.raises(GemError, match="process 0 computes in bfloat16, and another has no units"):
        _check_same_dtype(torch.bfloat16, torch.device("cpu"))


def test_a_batch_that_cannot_be_shared_is_refused(options: TrainOptions) -> None:
    done = launch(dataclasses.replace(options, batch_size=9))
    assert done.returncode != 0
    assert "--batch-size 9 does not go into equal parts for 2 processes" in done.stderr
    assert not options.out.exists()
