"""A training run, from its options to a GEM checkpoint with its model card."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from gem_vllm.checkpoint import add_special_tokens, load_base, save_checkpoint
from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.folders import is_no_room, write_json
from gem_vllm.tokens import load_tokenizer
from gem_vllm.training import peers
from gem_vllm.training.adapter_model import add_adapter
from gem_vllm.training.batches import TrainBatches
from gem_vllm.training.dense_model import DenseModel
from gem_vllm.training.held_out import HeldOutPairs
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.model_card import source_commit, write_model_card
from gem_vllm.training.modes import model_class
from gem_vllm.training.options import TrainOptions, compute_dtype
from gem_vllm.training.run_folder import (
    FINISHED_FILE,
    check_folders,
    is_disk_full,
    is_finished,
    start_run,
    step_of,
    whole_checkpoints,
)
from gem_vllm.training.sequences import Template
from gem_vllm.training.sharding import ShardedTrainer, shard_base
from gem_vllm.training.teacher import load_teacher
from gem_vllm.training.trainer import SPEARMAN, GemTrainer
from gem_vllm.weights import EMBEDDING, read_tensor

# Of the other processes for the first, which alone reads all of the data and the base, to know them
# again, and writes the result.
LONGEST_WAIT = timedelta(days=1)


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Train as ``options`` say and write the GEM checkpoint ``options.out``; return that folder.

    While it runs, its checkpoints and TensorBoard logs are in ``options.run_folder``; the logs stay
    there. ``resume`` continues from the last whole checkpoint, with the same losses as a run that
    was not interrupted, and leaves a finished run as it is; ``overwrite`` starts anew in place of
    an earlier result.

    Raises GemError for bad input, before any long work, and for a disk that is full. A
    KeyboardInterrupt passes through; the last checkpoint is whole in either case.
    """
    state = join_processes()
    commit = source_commit()
    if state.is_main_process:
        check_folders(options, resume=resume, overwrite=overwrite)
    state.wait_for_everyone()
    if resume and is_finished(options):
        if state.is_main_process:
            print(f"{options.out}: already finished", file=sys.stderr)
        return options.out
    trainer, tokenizer, gem_config = make_trainer(options, progress=progress)
    try:
        if state.is_main_process:
            start_run(options, resume=resume)
        state.wait_for_everyone()
        start = next(reversed(whole_checkpoints(options.run_folder)), None)
        step = 0 if start is None else step_of(start)
        _check_same_step(step, options, trainer.args.device)
        trainer.train_dataset.start_step = step
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
        trained = trainer.trained_state()
        if state.is_main_process:
            _save(trainer, trained, tokenizer, gem_config)
            write_model_card(options.out, options, trainer.state.log_history, commit)
            write_json(options.run_folder / FINISHED_FILE, {"steps": trainer.state.global_step})
    except GemError as error:
        if is_no_room(error):  # for the result
            raise GemError(
                f"{error}. The last checkpoint in {options.run_folder} is whole: continue with "
                "--resume"
            ) from error
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_disk_full(error, options.run_folder):
            raise GemError(
                f"the disk of {options.run_folder} is full; the last checkpoint there is whole: "
                "make room and continue with --resume"
            ) from error
        raise
    if state.is_main_process:
        for checkpoint in whole_checkpoints(options.run_folder):
            shutil.rmtree(checkpoint)
    state.wait_for_everyone()
    return options.out


def make_trainer(
    options: TrainOptions, *, progress: bool = True
) -> tuple[GemTrainer, PreTrainedTokenizerBase, GemConfig]:
    """The trainer of a run, its tokenizer (with the special tokens) and its gem_config."""
    torch.manual_seed(options.seed)
    dtype = compute_dtype(options.dtype)
    # What is trained is kept in float32; a frozen base may as well be in what it computes in.
    model, tokenizer = load_base(
        options.base,
        dtype=dtype if options.mode == "adapter" else torch.float32,
        weights=not options.shard or peers.rank() == 0,  # the others get their part of them
    )
    context = model.config.get_text_config().max_position_embeddings
    if options.max_tokens > context:
        raise GemError(f"--max-tokens {options.max_tokens} is over the base's context of {context}")
    special_ids = add_special_tokens(model, tokenizer, options.special_tokens)
    # Training text is read by a tokenizer that does not know the special tokens: text never
    # becomes one.
    plain_tokenizer = load_tokenizer(options.base)
    batches = TrainBatches(options, plain_tokenizer, special_ids)
    batches.check()
    held_out = None
    if options.held_out_pairs is not None:
        held_out = HeldOutPairs(
            Path(options.held_out_pairs), plain_tokenizer, batches.template, batches.max_content
        )
    hidden_size = model.config.get_text_config().hidden_size
    gem_config = _gem_config(options, special_ids, batches.template, hidden_size)
    training_model = build_model(model, special_ids, options)
    training_model.instruction_tokens = len(batches.template.instruction)
    arguments = training_arguments(options, bf16=dtype == torch.bfloat16)
    _check_same_dtype(dtype, arguments.device)
    if options.teacher is not None:
        training_model.teacher = load_teacher(
            options.teacher,
            plain_tokenizer.get_vocab(),
            batches.template.instruction,
            training_model,
            dtype=dtype,
            rows_per_pass=options.rows_per_pass,
        )
        training_model.teacher.model.to(arguments.device)
    if options.shard:
        shard_base(training_model, options, arguments.device)
    trainer = (ShardedTrainer if options.shard else GemTrainer)(
        training_model,
        batches,
        options,
        arguments,
        held_out=held_out,
        progress=progress,
    )
    return trainer, tokenizer, gem_config


def _gem_config(
    options: TrainOptions, special_ids: tuple[int, ...], template: Template, hidden_size: int
) -> GemConfig:
    """The run's gem_config; GemError for a --matryoshka that no embedding is as large as."""
    gem_config = GemConfig(
        special_ids,
        options.pooling,
        options.mode,
        options.base.resolve().name,
        instruction_ids=template.instruction,
        extra={"matryoshka_dimensions": list(options.matryoshka)} if options.matryoshka else {},
    )
    size = gem_config.embedding_size(hidden_size)
    if max(options.matryoshka, default=0) > size:
        raise GemError(f"--matryoshka is over an embedding's size, which is {size} here")
    return gem_config


def build_model(
    model: PreTrainedModel, special_ids: tuple[int, ...], options: TrainOptions
) -> GemTrainingModel:
    """The training model of ``options.mode`` over a base with its special tokens."""
    lm: PreTrainedModel | PeftModel = model
    if options.mode != "full":
        lm = add_adapter(
            model,
            special_ids,
            rank=options.lora_rank,
            alpha=options.lora_alpha,
            modules=options.lora_modules,
            last_layers=options.lora_last_layers,
        )
    training_model = model_class(options.mode)(
        lm,
        special_ids,
        options.pooling,
        scale=options.scale,
        symmetric=options.symmetric,
        rows_per_pass=options.rows_per_pass,
        matryoshka=options.matryoshka,
    )
    if isinstance(training_model, DenseModel) and options.packing:
        training_model.pack_into = options.max_tokens
    return training_model


def training_arguments(options: TrainOptions, *, bf16: bool) -> TrainingArguments:
    """``transformers``' own arguments: checkpoints, logs, seed, clipping.

    bf16: compute in bfloat16; only where trained weights are not in the base's own dtype.
    """
    arguments = TrainingArguments(
        output_dir=str(options.run_folder),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1.0,  # a factor: the schedule gives the rates themselves
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        report_to=["tensorboard"],
        save_steps=options.save_every,
        save_total_limit=options.keep_checkpoints,
        # With held-out pairs: a score with every checkpoint, and the best one is the result.
        eval_strategy="no" if options.held_out_pairs is None else "steps",
        eval_steps=options.save_every,
        load_best_model_at_end=options.held_out_pairs is not None,
        metric_for_best_model=SPEARMAN,
        greater_is_better=True,
        seed=options.seed,
        ignore_data_skip=True,  # the data set itself starts where the checkpoint ends
        use_cpu=not torch.cuda.is_available(),
        bf16=bf16 and options.mode != "adapter",
    )
    # Not the launcher's: what is computed in which dtype is said above and by the models.
    arguments.mixed_precision = "bf16" if arguments.bf16 else "no"
    # One device a process: `peers` splits batches, whose rows are each other's negatives.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _save(
    trainer: GemTrainer,
    trained: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    gem_config: GemConfig,
) -> None:
    options, lm = trainer.options, trainer.model.lm
    if options.shard and options.mode != "adapter":
        lm = _on_a_whole_base(trained, options)
    if options.mode == "lora":
        lm = lm.merge_and_unload()
    if options.mode != "adapter":
        lm = lm.to(read_tensor(options.base, EMBEDDING).dtype)
    save_checkpoint(options.out, lm, tokenizer, gem_config)


def _on_a_whole_base(
    trained: dict[str, torch.Tensor], options: TrainOptions
) -> PreTrainedModel | PeftModel:
    model, tokenizer = load_base(options.base, dtype=torch.float32)
    special_ids = add_special_tokens(model, tokenizer, options.special_tokens)
    whole = build_model(model, special_ids, options)
    whole.load_state_dict(trained)
    return whole.lm


def _check_same_step(step: int, options: TrainOptions, device: torch.device) -> None:
    """GemError in a process that does not see the checkpoint that another goes on from."""
    if peers.count() > 1 and (newest := peers.largest(step, device)) != step:
        raise GemError(
            f"process {peers.rank()} finds no checkpoint of step {newest} in "
            f"{options.run_folder}; all processes have to share that folder"
        )


def _check_same_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """GemError in a process that has units for bfloat16, where another has none."""
    bits = torch.finfo(dtype).bits
    if peers.count() > 1 and peers.largest(bits, device) != bits:
        raise GemError(
            f"process {peers.rank()} computes in bfloat16, and another has no units for it; give "
            "--dtype float32, or bfloat16, to all"
        )


def join_processes() -> PartialState:
    """Meet the other processes, where a launcher (torchrun, accelerate) has started several."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true":
            raise GemError(f"training shards by itself: launch it without {name}, and give --shard")
    return PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)
