"""The trainer: ``transformers.Trainer`` by its public hooks."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.batches import TrainBatches
from gem_vllm.training.held_out import HeldOutPairs
from gem_vllm.training.losses import MAX_LOG_TEMPERATURE
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.run_folder import MarkWhole

SPEARMAN = "eval_spearman"
LOSSES = ("loss_ntp", "loss_cl", "loss_lex")
LENGTHS = ("cl_lengths", "ntp_lengths", "lex_lengths")
# In parameters' names; the second is of PEFT.
NEVER_DECAY = ("log_temperature", "trainable_tokens_delta")


class GemTrainer(Trainer):
    """Trains a ``GemTrainingModel`` on ``TrainBatches``; see `log` for what is logged."""

    # Of Trainer, which mypy is not shown.
    control: TrainerControl
    lr_scheduler: Any
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        model: GemTrainingModel,
        batches: TrainBatches,
        options: TrainOptions,
        args: TrainingArguments,
        *,
        held_out: HeldOutPairs | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model=model, args=args, train_dataset=batches, eval_dataset=[] if held_out else None
        )
        self.options = options
        self.held_out = held_out
        self._window: dict[str, list[float]] = {}
        self._window_tokens = 0
        self._window_start = time.perf_counter()
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self._bar = LossProgress()
        if progress:
            self.add_callback(self._bar)
        self.add_callback(ClampTemperature)
        self.add_callback(Intervals)
        self.add_callback(BestOfThisFolder)
        if options.patience is not None:
            self.add_callback(StopWhenNoBetter(options.patience))
        self.add_callback(MarkWhole)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s; the bar is closed however training ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._bar.close()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """What is trained, whole, by the names of `GemTrainingModel.state_dict`.

        All processes must call it.
        """
        return self.model.state_dict()

    def get_train_dataloader(self) -> DataLoader:
        """Batches as they come: they are made whole, and in order, by the data set."""
        return DataLoader(self.train_dataset, batch_size=None)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """``Trainer``'s, without the temperature and an adapter's special tokens.

        Neither is a weight of a product, to be kept small: the losses alone say what they are.
        """
        return [
            name
            for name in super().get_decay_parameter_names(model)
            if not any(part in name for part in NEVER_DECAY)
        ]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The two learning rates, each weighed as its loss is, under one warm-up and cosine."""
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: learning_rate_at(step, self.options) / self.args.learning_rate,
            )
        return self.lr_scheduler

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The model's own loss; its parts and its tokens are kept for the log."""
        kwargs["return_outputs"] = False
        outputs = model(**inputs)
        means = {name: peers.total(value) / peers.count() for name, value in outputs.items()}
        for name in LOSSES:
            if name in means:
                self._window.setdefault(name, []).append(means[name].item())
        if not torch.isfinite(means["loss"]):
            raise GemError(
                f"the loss is not finite at step {self.state.global_step + 1}; "
                "use a lower learning rate, or --dtype float32"
            )
        self._window_tokens += sum(int(inputs[name].sum()) for name in LENGTHS if name in inputs)
        return outputs["loss"]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Spearman's correlation on the held-out pairs."""
        assert self.held_out is not None
        started = time.perf_counter()
        # One process's figure for all: whether to stop must not differ by a rounding.
        with self.accelerator.autocast():
            found = self.held_out.spearman(self.model)
        mine = torch.tensor(found, device=self.args.device)
        metrics = {SPEARMAN: float(peers.total(mine if peers.rank() == 0 else 0.0 * mine))}
        self._window_start += time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add losses and tokens/s since the last log, and what cosines are multiplied by now."""
        if "loss" in logs:
            seconds = time.perf_counter() - self._window_start
            logs |= {name: sum(values) / len(values) for name, values in self._window.items()}
            logs["temperature"] = math.exp(float(self.model.log_temperature.detach()))
            tokens = torch.tensor(self._window_tokens, device=self.args.device)
            logs["tokens_per_s"] = int(peers.total(tokens)) / seconds
            self._window, self._window_tokens = {}, 0
            self._window_start = time.perf_counter()
        super().log(logs, start_time)


def learning_rate_at(step: int, options: TrainOptions) -> float:
    """The learning rate of a step: linear warm-up, then cosine to 0, times the phase's own rate.

    Between the phases (0 < alpha < 1) the two rates are weighed by alpha, as the losses are.
    """
    warmup = math.ceil(options.warmup_share * options.steps)
    if step < warmup:
        shape = (step + 1) / (warmup + 1)
    else:
        done = (step - warmup) / max(options.steps - warmup, 1)
        shape = 0.5 * (1.0 + math.cos(math.pi * done))
    alpha = options.alpha_of(step)
    assert options.ntp_learning_rate is not None
    assert options.contrastive_learning_rate is not None
    rate = (1.0 - alpha) * options.ntp_learning_rate + alpha * options.contrastive_learning_rate
    return rate * shape


class LossProgress(ProgressCallback):
    """A bar with steps, remaining time, the losses and tokens/s."""

    SHOWN = (*LOSSES, SPEARMAN, "tokens_per_s")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the figures beside the bar instead of printing a line for each step."""
        if self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.4g}" for name in self.SHOWN if name in logs}
            self.training_bar.set_postfix(shown)

    def close(self) -> None:
        """Leave the bar as it is, on a line of its own."""
        if self.training_bar is not None:
            self.training_bar.close()


class Intervals(TrainerCallback):
    """When to log, save and score: as this run's options say, and at the run's end."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed state brings the intervals of the run's start with it."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Where checkpoints are scored, score the last one too, whatever step it is of."""
        if args.eval_strategy != IntervalStrategy.NO and state.global_step >= state.max_steps:
            control.should_evaluate = True


class BestOfThisFolder(TrainerCallback):
    """Look for the best checkpoint where the run is now; a state names it by where the run was."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """``Trainer`` has dropped what it did not find there, and would keep the last weights."""
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best)


class ClampTemperature(TrainerCallback):
    """Keep the temperature where its loss has a gradient, so that it can come back from a bound."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clamp its logarithm as the loss does."""
        kwargs["model"].log_temperature.data.clamp_(0.0, MAX_LOG_TEMPERATURE)


class StopWhenNoBetter(TrainerCallback):
    """Stop when ``patience`` checkpoints in a row have scored no better than the best before them.

    Counted in the run's log, so that an interrupted run stops where an uninterrupted one does;
    ``transformers``' own callback starts to count anew.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that stopped, but was interrupted before its result was written, has no batches."""
        if self._is_time(state):
            kwargs["train_dataloader"].dataset.start_step = state.max_steps

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, where it is time."""
        if self._is_time(state):
            control.should_training_stop = True

    def _is_time(self, state: TrainerState) -> bool:
        scores = [log[SPEARMAN] for log in state.log_history if SPEARMAN in log]
        return bool(scores) and len(scores) - 1 - scores.index(max(scores)) >= self.patience
