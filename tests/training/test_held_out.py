"""Held-out pairs: they choose the checkpoint and end the run; bad ones are refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from gem_vllm.errors import GemError
from gem_vllm.reference import ReferenceEmbedder
from gem_vllm.training.held_out import HeldOutPairs
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import train
from tests.training.conftest import losses, train_until


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
    options: TrainOptions, pairs: Path, rate: float, interrupted: bool
) -> None:
    options = dataclasses.replace(
        options,
        held_out_pairs=str(pairs),
        save_every=4,
        contrastive_learning_rate=rate,
        ntp_learning_rate=rate,
    )
    if interrupted:
        train_until(5, options)
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


def test_the_best_checkpoint_is_the_result_of_a_run_that_was_moved(
    options: TrainOptions, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dataclasses.replace(options, held_out_pairs=str(pairs))
    scores = iter([0.1, 0.9, 0.5])
    monkeypatch.setattr(HeldOutPairs, "spearman", lambda *_: next(scores))
    with monkeypatch.context() as patch:
        patch.setattr("gem_vllm.training.run._save", full_disk)
        with pytest.raises(GemError, match="is full"):
            train(options, progress=False)
    moved = dataclasses.replace(options, out=options.out.with_name("moved"))
    shutil.copytree(options.run_folder, moved.run_folder)
    for each in (options, moved):  # the checkpoints where it was are gone by the second's turn
        train(each, resume=True, progress=False)
    adapters = [each.out / "gem_adapter" / "adapter_model.safetensors" for each in (options, moved)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert "Spearman 0.9000 at step 4, the best of 3" in (moved.out / "README.md").read_text()


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("interrupted", ["never", "early", "at its end"])
def test_a_run_that_no_longer_gets_better_stops(
    options: TrainOptions, pairs: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
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
    if interrupted == "early":
        train_until(2, options)
    elif interrupted == "at its end":
        with monkeypatch.context() as patch:
            patch.setattr("gem_vllm.training.run._save", full_disk)
            with pytest.raises(GemError, match="is full"):
                train(options, progress=False)
    train(options, resume=interrupted != "never", progress=False)
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
        ('{"sentence1": "a", "sentence2": "b", "score": true}', "line 1: .* score is a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": NaN}', "line 1: .* score is a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": 1e999}', "line 1: .* score is a number"),
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
