"""What a contrastive step of adapter mode costs, against a forward pass of the same tokens.

    python benchmarks/train_step.py --base DIR [--special-tokens 1] [--tokens 128] [--texts 32]

Random texts of the given length, 32 anchors and 32 positives. Forward: the base's decoder over
[text | special tokens], without gradients, as many texts at a time as the step takes. Step: all of
it, optimizer included. Prints one JSON object; times are medians over ``--repeats``, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gem_vllm.checkpoint import add_special_tokens, load_base
from gem_vllm.training.adapter_model import TEXTS_PER_PASS, AdapterModel, add_adapter
from gem_vllm.training.run import compute_dtype


def main() -> None:
    """Time both and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--special-tokens", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128, help="length of every text")
    parser.add_argument("--texts", type=int, default=32, help="texts of a batch")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model, special_ids = make_model(args.base, args.special_tokens, args.rank, args.dtype)
    shape = (2 * args.texts, args.tokens)
    seconds = measure(model, special_ids, shape, args.repeats)
    result = {
        "special_tokens": args.special_tokens,
        "tokens": args.tokens,
        "texts": args.texts,
        "dtype": str(model.base.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **{name: round(value, 4) for name, value in seconds.items()},
        "step_per_forward": round(seconds["step_s"] / seconds["forward_s"], 3),
    }
    print(json.dumps(result))


def make_model(
    base: Path, special_tokens: int, rank: int, dtype: str
) -> tuple[AdapterModel, tuple[int, ...]]:
    """An untrained adapter on a base, and the ids of its special tokens."""
    model, tokenizer = load_base(base, dtype=compute_dtype(dtype))
    special_ids = add_special_tokens(model, tokenizer, special_tokens)
    lm = add_adapter(model, special_ids, rank=rank, alpha=2 * rank)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AdapterModel(lm, special_ids, "mean", scale=20.0, symmetric=False)
    return model.to(device), special_ids


def measure(
    model: AdapterModel, special_ids: tuple[int, ...], shape: tuple[int, int], repeats: int
) -> dict[str, float]:
    """Median seconds ``forward_s`` and ``step_s`` for texts [2 * texts, tokens] of random ids."""
    device = next(model.parameters()).device
    texts = torch.randint(1, min(special_ids), shape, device=device)
    lengths = torch.full(shape[:1], shape[1], device=device)
    rows = torch.cat([texts, torch.tensor(special_ids, device=device).expand(len(texts), -1)], 1)
    alpha = torch.ones((), device=device)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    @torch.no_grad()
    def forward() -> None:
        with model.lm.disable_adapter():
            for part in rows.split(TEXTS_PER_PASS):
                model.base.get_decoder()(input_ids=part, use_cache=False)

    def step() -> None:
        model(alpha, texts, lengths)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    times: dict[str, list[float]] = {"forward_s": [], "step_s": []}
    for _ in range(repeats + 1):
        times["forward_s"].append(seconds_of(forward))
        times["step_s"].append(seconds_of(step))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def seconds_of(action: Callable[[], Any]) -> float:
    """Wall time of ``action``, the accelerator's work included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
