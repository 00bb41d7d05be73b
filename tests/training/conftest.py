"""Text for the trainer's tests, made up from a seed, and a short run over it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run import train
from gem_vllm.training.trainer import LOSSES, GemTrainer

WORDS = (
    "bread river stone bridge library moon people rock capital city flour yeast water first old "
    "newspaper map reader hour France Paris walk lend bake keep run jump lazy quick brown"
)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 80 texts of 6 to 20 words, one a line."""
    rng = random.Random(0)
    words = WORDS.split()
    lines = [" ".join(rng.choices(words, k=rng.randint(6, 20))) for _ in range(80)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def options(tiny_base: Callable[..., Path], texts: Path, tmp_path: Path) -> TrainOptions:
    """Six steps that go through both phases' losses at once (alpha 0.5)."""
    return short_options(tiny_base(), texts, tmp_path / "gem")


def short_options(base: Path, texts: Path, out: Path, **changes: Any) -> TrainOptions:
    """As `options`, for processes that have no fixtures."""
    short: dict[str, Any] = {
        "special_tokens": 2,
        "steps": 6,
        "batch_size": 8,
        "alpha_schedule": "constant",
        "alpha": 0.5,
        "lora_rank": 4,
        "lora_alpha": 8,
        "save_every": 2,
        "dtype": "float32",
        "drop_rate": 0.3,
    }
    return TrainOptions(base=base, data=(str(texts),), out=out, **{**short, **changes})


def losses(options: TrainOptions) -> dict[str, list[float]]:
    """The losses that the run logged for TensorBoard, by name, a value a step."""
    by_step: dict[str, dict[int, float]] = {}
    for folder in sorted((options.run_folder / "runs").iterdir()):
        events = EventAccumulator(str(folder))
        events.Reload()
        for name in LOSSES:
            if f"train/{name}" in events.Tags()["scalars"]:
                for event in events.Scalars(f"train/{name}"):
                    by_step.setdefault(name, {})[event.step] = event.value
    return {name: [values[step] for step in sorted(values)] for name, values in by_step.items()}


@contextmanager
def failing_at(step: int, error: BaseException) -> Iterator[None]:
    """Training raises `error` after so many steps."""
    compute_loss = GemTrainer.compute_loss

    def failing(self: GemTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == step:
            raise error
        return compute_loss(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GemTrainer, "compute_loss", failing)
        yield


def train_until(step: int, options: TrainOptions, *, resume: bool = False) -> None:
    """Train as Ctrl-C after so many steps leaves it."""
    with failing_at(step, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        train(options, resume=resume, progress=False)
