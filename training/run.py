"""A training run from its options to a GEM checkpoint."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainingArguments

from gem_vllm.checkpoint import add_special_tokens, load_base, save_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.training.adapter_model import AdapterModel, add_adapter, break_symmetry
from gem_vllm.training.batches import TrainBatches
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.trainer import GemTrainer, whole_checkpoints

OPTIONS_FILE = "options.json"


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train as ``options`` say and write the checkpoint ``options.out``; return that folder.

    While it runs, its checkpoints and TensorBoard logs are in ``options.run_folder``. ``resume``
    continues from the last whole one, with the same losses as a run that was not interrupted;
    ``overwrite`` starts anew over an earlier result. Raises GemError for bad input, before any long
    work.
    """
    start = _prepare_folders(options, resume=resume, overwrite=overwrite)
    torch.manual_seed(options.seed)
    dtype = compute_dtype(options.dtype)
    model, tokenizer = load_base(options.base, dtype=dtype)
    batches, special_ids = None, add_special_tokens(model, tokenizer, options.special_tokens)
    plain_tokenizer = AutoTokenizer.from_pretrained(options.base)
    batches = TrainBatches(options, plain_tokenizer, special_ids, model.config.eos_token_id or 0)
    batches.check()

    training_model = build_model(model, special_ids, options)
    trainer = GemTrainer(
        training_model, batches, options, training_arguments(options), progress=progress
    )
    if start is not None:
        batches.start_step = int(start.name.rpartition("-")[2])
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    save_checkpoint(
        options.out,
        training_model.lm,
        tokenizer,
        GemConfig(special_ids, options.pooling, options.mode, str(options.base)),
    )
    return options.out


def build_model(
    model: Any, special_ids: tuple[int, ...], options: TrainOptions
) -> GemTrainingModel:
    """The training model of ``options.mode`` over a base with its special tokens."""
    break_symmetry(model, special_ids, seed=options.seed)
    lm = add_adapter(model, special_ids, rank=options.lora_rank, alpha=options.lora_alpha)
    return AdapterModel(lm, special_ids, options.pooling, symmetric=options.symmetric)


def training_arguments(options: TrainOptions) -> TrainingArguments:
    """``transformers``' own arguments: checkpoints, logs, seed, clipping."""
    return TrainingArguments(
        output_dir=str(options.run_folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1.0,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        seed=options.seed,
        ignore_data_skip=True,
        use_cpu=not torch.cuda.is_available(),
    )


def compute_dtype(name: str) -> torch.dtype:
    """``auto``: bfloat16 where the machine computes in it (CUDA, AVX512-BF16, AMX), else float32."""
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units else torch.float32


def _prepare_folders(options: TrainOptions, *, resume: bool, overwrite: bool) -> Path | None:
    """Check --out and the run's folder; return the checkpoint to continue from, if any."""
    run = options.run_folder
    if resume and overwrite:
        raise GemError("give --resume or --overwrite, not both")
    used = [folder for folder in (options.out, run) if folder.exists() and any(folder.iterdir())]
    if overwrite:
        shutil.rmtree(run, ignore_errors=True)
    elif not resume and used:
        raise GemError(
            f"{used[0]} is not empty; continue the run with --resume, start anew with --overwrite,"
            " or choose another --out"
        )
    recorded = run / OPTIONS_FILE
    if resume and recorded.is_file():
        if differs := options.difference(json.loads(recorded.read_text(encoding="utf-8"))):
            flags = ", ".join("--" + name.replace("_", "-") for name in differs)
            raise GemError(f"--resume needs the options of the run's start; these differ: {flags}")
    run.mkdir(parents=True, exist_ok=True)
    recorded.write_text(json.dumps(options.to_dict(), indent=2) + "\n", encoding="utf-8")
    whole = whole_checkpoints(run)
    for folder in run.glob("checkpoint-*"):
        if folder not in whole:
            shutil.rmtree(folder)
    if resume:
        found = f"continuing from step {whole[-1].name.rpartition('-')[2]}" if whole else "no step yet"
        print(f"{run}: {found}", file=sys.stderr)
    return whole[-1] if whole else None
