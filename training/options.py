"""What a training run is told, checked once at the door."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gem_vllm.config import MAX_SPECIAL_TOKENS
from gem_vllm.errors import GemError
from gem_vllm.folders import content_sha256
from gem_vllm.training.choices import (
    CHOICES,
    MAX_SEED,
    AlphaSchedule,
    Dtype,
    LoraModules,
    Mode,
    Pooling,
    Positives,
)
from gem_vllm.training.lexical import NEIGHBOURHOOD, STEMMERS
from gem_vllm.training.losses import MAX_SCALE, alpha_at
from gem_vllm.training.positives import MIN_SPAN_TOKENS

# What may differ between a run and its --resume without changing a loss.
FREE_ON_RESUME = frozenset(
    {"out", "save_every", "patience", "keep_checkpoints", "log_every", "shard"}
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One training run. Steps are optimizer steps; lengths are tokens; ``None`` is "by mode".

    Defaults by mode: the adapter is trained contrastively alone (``alpha_schedule`` constant) at
    5e-4, and sees no raw text, on which it would not act; ``full`` and ``lora`` have the paper's
    two phases, ``full`` with the paper's learning rates too (arXiv 2506.04344, section 4.1). Its
    100 steps of next-token prediction are a tenth of the steps where those are fewer than 1,000. An
    adapter's positives have 80 % of their tokens dropped, the paper's 30 %.
    """

    base: Path
    data: tuple[str, ...]
    out: Path
    mode: Mode = "adapter"
    special_tokens: int = 1
    pooling: Pooling = "mean"
    instruction: str = ""
    text_field: str = "text"
    pairs: str | None = None
    pairs_share: float = 0.25
    held_out_pairs: str | None = None
    patience: int | None = None
    steps: int = 1000
    batch_size: int = 32
    max_tokens: int = 512
    seed: int = 0
    dtype: Dtype = "auto"
    # Mixed next-token prediction.
    raw_share: float | None = None
    reconstruction_share: float = 0.5
    ntp_learning_rate: float | None = None
    # Contrastive.
    positives: Positives = "dropout"
    drop_rate: float | None = None
    anchor_drop_rate: float = 0.0
    span_share: float = 0.5
    span_tokens: int = 64
    cloze_share: float = 0.0
    lexical_share: float = 0.0
    teacher: Path | None = None
    stemmer: str = "english"
    scale: float = 20.0
    symmetric: bool = False
    matryoshka: tuple[int, ...] = ()
    rows_per_pass: int | None = None
    packing: bool = True
    shard: bool = False
    contrastive_learning_rate: float | None = None
    # How the two are weighed.
    alpha_schedule: AlphaSchedule | None = None
    alpha: float = 1.0
    alpha_steps: int | None = None
    # Optimizer.
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    # LoRA (modes adapter and lora).
    lora_rank: int = 16
    lora_alpha: int = 32
    lora_modules: LoraModules = "all"
    lora_last_layers: int | None = None
    # Keeping track.
    save_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 1

    def __post_init__(self) -> None:
        adapter = self.mode == "adapter"
        defaults = {
            "alpha_schedule": "constant" if adapter else "step",
            "alpha_steps": min(100, self.steps // 10),
            "raw_share": 0.0 if adapter else 0.8,
            # The paper's, and for an adapter the best of those tried (docs/results.md). Masks hide
            # tokens of both texts.
            "drop_rate": 0.8 if adapter and self.positives != "masks" else 0.3,
            "ntp_learning_rate": 1e-4 if self.mode == "full" else 5e-4,
            "contrastive_learning_rate": {"adapter": 5e-4, "lora": 1e-4}.get(self.mode, 1e-5),
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "out", Path(os.path.abspath(self.out)))  # "." has no name
        self._check()

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its checkpoints, logs and options: ``OUT.run``, beside the result."""
        return self.out.with_name(self.out.name + ".run")

    def alpha_of(self, step: int) -> float:
        """The weight of the contrastive loss at a step (counted from 0)."""
        assert self.alpha_schedule is not None
        assert self.alpha_steps is not None
        return alpha_at(step, self.alpha_schedule, value=self.alpha, switch_step=self.alpha_steps)

    def bound(self) -> dict[str, Any]:
        """What the losses depend on, as JSON-ready values: a run and its resumption share it.

        Files count by what they hold, not by where they are: all of the base and of the data is
        read, which takes seconds a GB.
        """
        values = dataclasses.asdict(self) | {
            "dtype": str(compute_dtype(self.dtype)).removeprefix("torch."),
            "base": content_sha256(self.base),
            "data": [_content(spec) for spec in self.data],
            "pairs": self.pairs and _content(self.pairs),
            "held_out_pairs": self.held_out_pairs and _content(self.held_out_pairs),
            "teacher": self.teacher and content_sha256(self.teacher),
            "matryoshka": list(self.matryoshka),
        }
        if self.alpha_schedule == "constant":
            del values["alpha_steps"]
        return {name: value for name, value in values.items() if name not in FREE_ON_RESUME}

    def difference(self, recorded: dict[str, Any]) -> list[str]:
        """Names of the options in which a run that recorded `bound` differs.

        An option that is newer than the run had its default there. Which dtype "auto" was, was not
        told once.
        """
        now = self.bound()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if recorded.get("dtype") == "auto":
            recorded = {**recorded, "dtype": now["dtype"]}
        return [name for name in now if now[name] != recorded.get(name, defaults[name])]

    def _check(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise GemError(f"{flag(name)} must be one of {', '.join(choices)}")
        if not self.data:
            raise GemError("no training text; give at least one --data")
        if not self.out.name:
            raise GemError(f"--out {self.out} cannot be replaced; name a folder inside it")
        if not 0 <= self.seed <= MAX_SEED:
            raise GemError(f"--seed must be from 0 to {MAX_SEED}")
        if not 1 <= self.special_tokens <= MAX_SPECIAL_TOKENS:
            raise GemError(f"--special-tokens must be from 1 to {MAX_SPECIAL_TOKENS}")
        at_least = {
            "steps": 1,
            "batch_size": 2,
            "max_tokens": 2 * MIN_SPAN_TOKENS + self.special_tokens,
            "span_tokens": MIN_SPAN_TOKENS,
            "alpha_steps": 0,
            "lora_rank": 1,
            "lora_alpha": 1,
            "save_every": 1,
            "keep_checkpoints": 2,
            "log_every": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise GemError(f"{flag(name)} must be at least {least}")
        for name in (
            "raw_share",
            "reconstruction_share",
            "alpha",
            "warmup_share",
            "span_share",
            "cloze_share",
            "pairs_share",
            "lexical_share",
        ):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GemError(f"{flag(name)} must be from 0 to 1")
        if self.lexical_share > 0.0 and self.batch_size < NEIGHBOURHOOD:
            raise GemError(f"--lexical-share needs a --batch-size of at least {NEIGHBOURHOOD}")
        if self.stemmer not in STEMMERS:
            raise GemError(f"--stemmer must be one of {', '.join(STEMMERS)}")
        for name in ("rows_per_pass", "lora_last_layers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise GemError(f"{flag(name)} must be at least 1")
        assert self.alpha_steps is not None
        if self.alpha_schedule == "step" and self.alpha_steps >= self.steps:
            raise GemError(
                f"--alpha-steps {self.alpha_steps} are all of --steps {self.steps}: no step would "
                "be contrastive; give fewer (for next-token prediction alone: --alpha-schedule "
                "constant --alpha 0)"
            )
        if any(size < 1 for size in self.matryoshka):
            raise GemError("--matryoshka must be at least 1: how many leading numbers")
        if self.span_share + self.cloze_share > 1.0:
            raise GemError("--span-share and --cloze-share together must be at most 1")
        if self.patience is not None and (self.held_out_pairs is None or self.patience < 1):
            raise GemError("--patience must be at least 1, and needs --held-out-pairs")
        assert self.drop_rate is not None
        if not 0.0 < self.drop_rate < 1.0:
            raise GemError("--drop-rate must be between 0 and 1: the share of tokens dropped")
        if not 0.0 <= self.anchor_drop_rate < 1.0:
            raise GemError("--anchor-drop-rate must be at least 0 and less than 1")
        if not 1.0 <= self.scale <= MAX_SCALE:
            raise GemError(f"--scale must be from 1 to {MAX_SCALE:g}")
        for name in ("ntp_learning_rate", "contrastive_learning_rate", "max_grad_norm"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise GemError(f"{flag(name)} must be greater than 0, and finite")
        if not 0.0 <= self.weight_decay < math.inf:
            raise GemError("--weight-decay must be at least 0, and finite")
        self._check_effects()

    def _check_effects(self) -> None:
        """Raise GemError for what would have no effect beside the other options."""
        if self.positives == "mix" and len(self.data) > 2:
            raise GemError(
                f"--positives mix reads two --data, and {len(self.data)} are given: put the texts "
                "for spans into one file, and those for dropout into another"
            )
        if self.teacher is not None and self.lexical_share == 0.0:
            raise GemError("--teacher teaches in lexical batches; give a --lexical-share")
        if self.teacher is not None and self.shard:
            raise GemError("--teacher is whole in every process; give it without --shard")
        contrastive = {
            "--pairs": self.pairs is not None,
            "--lexical-share": self.lexical_share > 0.0,
            "--matryoshka": bool(self.matryoshka),
        }
        given = [name for name, is_given in contrastive.items() if is_given]
        if self.alpha == 0.0 and given:
            raise GemError(
                f"{' and '.join(given)}: for contrastive steps, and with --alpha 0 there are none; "
                f"give a greater --alpha, or none of {'these' if given[1:] else 'it'}"
            )
        if self.pairs is not None and self.pairs_share == 0.0:
            raise GemError("--pairs with --pairs-share 0 are never read; give a greater share")
        if self.pairs is not None and self.pairs_share + self.lexical_share > 1.0:
            raise GemError(
                f"--pairs-share {self.pairs_share:g} and --lexical-share {self.lexical_share:g} "
                "together must be at most 1: a batch is of one of them"
            )
        if self.alpha == 0.0 and self.raw_share == 1.0 and self.mode == "adapter":
            raise GemError(
                "--alpha 0 with --raw-share 1 trains nothing: an adapter does not act on raw text; "
                "give a greater --alpha, or a smaller --raw-share"
            )


def compute_dtype(name: str) -> torch.dtype:
    """``auto``: bfloat16 where there are units for it (CUDA, AVX512-BF16, AMX), else float32."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if torch.cuda.is_available():
        has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_units else torch.float32
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units else torch.float32


def _content(spec: str) -> str:
    """The hash of a file; a data set's name, as it is."""
    return content_sha256(Path(spec)) if os.path.isfile(spec) else spec


def flag(name: str) -> str:
    """The command line's name of an option."""
    return "--" + name.replace("_", "-")
