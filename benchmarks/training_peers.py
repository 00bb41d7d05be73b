"""The peers of `training.py`, each run in a process of its own: `python training_peers.py SETUP`.

SETUP is a JSON file: ``peer``, ``base``, ``pairs`` (a .jsonl file of anchor and positive),
``batch`` (pairs), ``steps``, ``special_tokens``, ``dtype``, ``work`` (a folder). Prints one JSON
object: seconds of every step, tokens of a step, and the most memory that model and training took.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from gem_vllm.checkpoint import add_special_tokens, load_base
from gem_vllm.training.adapter_model import TEXTS_PER_PASS
from gem_vllm.training.options import TrainOptions, compute_dtype
from gem_vllm.training.run import make_trainer
from gem_vllm.training.sequences import pad

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
Run = Callable[[dict[str, Any], "Clock"], int]


class Clock(TrainerCallback):
    """Seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self) -> None:
        """A step begins."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._start = time.perf_counter()

    def stop(self) -> None:
        """It has ended."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer`` calls it, with the batch in hand."""
        self.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's part is done."""
        self.stop()


def read_pairs(setup: dict[str, Any]) -> list[dict[str, str]]:
    """Anchors and positives."""
    return [json.loads(line) for line in Path(setup["pairs"]).read_text().splitlines()]


def token_rows(setup: dict[str, Any]) -> list[list[int]]:
    """Token ids of the texts of a batch."""
    tokenizer = AutoTokenizer.from_pretrained(setup["base"])
    pairs = read_pairs(setup)[: setup["batch"]]
    texts = [pair[side] for side in ("anchor", "positive") for pair in pairs]
    return tokenizer(texts)["input_ids"]


def forward(setup: dict[str, Any], clock: Clock) -> int:
    """The base's decoder over [text | special tokens], without gradients."""
    model, tokenizer = load_base(Path(setup["base"]), dtype=compute_dtype(setup["dtype"]))
    special = add_special_tokens(model, tokenizer, setup["special_tokens"])
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    rows = token_rows(setup)
    ids, _ = pad([[*row, *special] for row in rows])
    with torch.no_grad():
        for _ in range(setup["steps"]):
            clock.start()
            for part in ids.to(model.device).split(TEXTS_PER_PASS[model.device.type]):
                model.get_decoder()(input_ids=part, use_cache=False)
            clock.stop()
    return sum(map(len, rows))


def gem(setup: dict[str, Any], clock: Clock) -> int:
    """``gem-vllm train``, contrastive, on the pairs."""
    mode = setup["peer"].removeprefix("gem ")
    rows = token_rows(setup)
    longest = max(map(len, rows)) + setup["special_tokens"]
    options = TrainOptions(
        base=Path(setup["base"]),
        data=(setup["pairs"],),
        text_field="anchor",
        pairs=setup["pairs"],
        pairs_share=1.0,
        out=Path(setup["work"]) / "gem",
        mode=mode,
        special_tokens=setup["special_tokens"],
        batch_size=setup["batch"],
        steps=setup["steps"],
        max_tokens=max(longest, TrainOptions.max_tokens),  # no text is cut
        alpha_schedule="constant",
        save_every=setup["steps"] + 1,
        dtype=setup["dtype"],
    )
    trainer, _, _ = make_trainer(options, progress=False)
    trainer.args.save_strategy = "no"
    trainer.add_callback(clock)
    trainer.train()
    return sum(map(len, rows))


def arguments(kind: Any, setup: dict[str, Any], **more: Any) -> Any:
    """What both other trainers are told."""
    return kind(
        output_dir=str(Path(setup["work"]) / "peer"),
        max_steps=setup["steps"],
        learning_rate=1e-4,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=compute_dtype(setup["dtype"]) == torch.bfloat16,
        **more,
    )


def trainer_lora(setup: dict[str, Any], clock: Clock) -> int:
    """An ordinary LoRA fine-tune: ``transformers.Trainer``, next-token prediction."""
    from peft import LoraConfig, get_peft_model

    model, _ = load_base(Path(setup["base"]), dtype=compute_dtype(setup["dtype"]))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    rows = token_rows(setup)
    ids, lengths = pad(rows)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    labels = ids.where(real, -100)
    batch = [
        {"input_ids": ids[row], "attention_mask": real[row].long(), "labels": labels[row]}
        for row in range(len(rows))
    ]
    Trainer(
        model=model,
        args=arguments(TrainingArguments, setup, per_device_train_batch_size=len(rows)),
        train_dataset=batch * setup["steps"],
        callbacks=[clock],
    ).train()
    return sum(map(len, rows))


def sentence_transformers(setup: dict[str, Any], clock: Clock) -> int:
    """``SentenceTransformerTrainer``: LoRA, mean pooling, in-batch negatives."""
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(setup["dtype"])
    model = SentenceTransformer(setup["base"], device=device, model_kwargs={"dtype": dtype})
    model.tokenizer.pad_token = model.tokenizer.pad_token or model.tokenizer.eos_token
    model.add_adapter(LoraConfig(task_type="FEATURE_EXTRACTION", **LORA))
    batch, count = read_pairs(setup), setup["batch"]
    SentenceTransformerTrainer(
        model=model,
        args=arguments(
            SentenceTransformerTrainingArguments, setup, per_device_train_batch_size=count
        ),
        train_dataset=Dataset.from_list(batch[:count] * setup["steps"]),
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[clock],
    ).train()
    return sum(map(len, token_rows(setup)))


# Before memory is counted, by every peer: what one of them imports is not what its training takes.
LIBRARIES = ("datasets", "peft", "sentence_transformers", "torch.utils.tensorboard")
PEERS: dict[str, Run] = {
    "forward": forward,
    "gem adapter": gem,
    "gem lora": gem,
    "gem full": gem,
    "Trainer, LoRA": trainer_lora,
    "sentence-transformers, LoRA": sentence_transformers,
}


def most_resident_bytes() -> int:
    """The most that this process has held (its ``ru_maxrss`` counts its parent's, too)."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Run the peer and print what it took."""
    setup = json.loads(Path(sys.argv[1]).read_text())
    for library in LIBRARIES:
        importlib.import_module(library)
    before = psutil.Process().memory_info().rss
    clock = Clock()
    tokens = PEERS[setup["peer"]](setup, clock)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = most_resident_bytes() - before
    print(json.dumps({"seconds": clock.seconds, "tokens": tokens, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
