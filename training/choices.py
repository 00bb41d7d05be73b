"""What some options of a training run are chosen from."""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["adapter", "full", "lora"]
Pooling = Literal["mean", "concat"]
Positives = Literal["dropout", "masks", "spans", "cloze", "mix"]
LoraModules = Literal["all", "attention", "mlp"]
AlphaSchedule = Literal["step", "linear", "constant"]
Dtype = Literal["auto", "float32", "bfloat16"]

MAX_SEED = 2**32 - 1  # of numpy, which transformers seeds, too

# By option.
CHOICES: dict[str, tuple[str, ...]] = {
    "mode": get_args(Mode),
    "pooling": get_args(Pooling),
    "positives": get_args(Positives),
    "lora_modules": get_args(LoraModules),
    "alpha_schedule": get_args(AlphaSchedule),
    "dtype": get_args(Dtype),
}
