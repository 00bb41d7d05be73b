"""``gem-vllm train``: from a base model and plain text to a GEM checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.training.choices import (
    AlphaSchedule,
    Dtype,
    LoraModules,
    Mode,
    Pooling,
    Positives,
)

_NTP = "Next-token prediction"
_CONTRASTIVE = "Contrastive learning"
_OPTIMIZER = "Optimizer"
_RUN = "Keeping track"


def train(
    base: Annotated[
        Path, typer.Option(help="Folder of the base model (Hugging Face form, safetensors).")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            help="Training text: a .txt file (one text a line) or a .jsonl file, also .gz, or a "
            "Hugging Face dataset as NAME or NAME:SPLIT. Can be given several times.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder to write; checkpoints and logs of the run go to OUT.run.")
    ],
    mode: Annotated[
        Mode,
        typer.Option(
            help="What is trained: an adapter that acts on the special tokens only (the base stays "
            "as it is), all weights (full), or a LoRA that is merged into the weights (lora).",
        ),
    ] = "adapter",
    special_tokens: Annotated[
        int, typer.Option(help="How many special tokens make an embedding (k), 1 to 64.")
    ] = 1,
    pooling: Annotated[
        Pooling, typer.Option(help="How their hidden states become one embedding.")
    ] = "mean",
    instruction: Annotated[
        str,
        typer.Option(
            help="Put between every text and the special tokens, here and whenever it is embedded: "
            "' This means in one word:'.",
        ),
    ] = "",
    text_field: Annotated[
        str, typer.Option(help="The field of a .jsonl file or a dataset that holds the text.")
    ] = "text",
    pairs: Annotated[
        str | None,
        typer.Option(
            help="Labelled pairs, where there are some: a .jsonl file, also .gz, with anchor, and "
            "positive or negative (a text or a list), or both; without positive, it is the anchor "
            "with tokens dropped."
        ),
    ] = None,
    pairs_share: Annotated[
        float, typer.Option(help="Share of the contrastive batches that are of --pairs.")
    ] = 0.25,
    held_out_pairs: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl file, also .gz, with sentence1, sentence2 and score: every checkpoint "
            "is scored on it (Spearman), and the best one is the result.",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop when so many checkpoints in a row are no better on --held-out-pairs.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[
        int, typer.Option(help="Texts a step; each text's negatives are the other texts.")
    ] = 32,
    max_tokens: Annotated[
        int, typer.Option(help="Longest sequence in tokens, special tokens included.")
    ] = 512,
    dtype: Annotated[
        Dtype, typer.Option(help="What to compute in; auto: bfloat16 where there are units for it.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="The same seed gives the same losses.")] = 0,
    positives: Annotated[
        Positives,
        typer.Option(
            help="A text's positive: itself with tokens dropped; or the text twice, seen through "
            "two random masks; or two spans of it; or a short span and the rest (cloze); or "
            "batches of each (mix: spans and cloze of the first --data, dropout of the last).",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = "dropout",
    drop_rate: Annotated[
        float | None,
        typer.Option(
            help="Share of a positive's tokens dropped, or hidden by a mask.",
            show_default="adapter 0.8, its masks and full and lora 0.3",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    anchor_drop_rate: Annotated[
        float,
        typer.Option(help="Share of the text's own tokens dropped.", rich_help_panel=_CONTRASTIVE),
    ] = 0.0,
    span_share: Annotated[
        float, typer.Option(help="Of mix, the share of spans.", rich_help_panel=_CONTRASTIVE)
    ] = 0.5,
    span_tokens: Annotated[
        int, typer.Option(help="Longest span, in tokens.", rich_help_panel=_CONTRASTIVE)
    ] = 64,
    cloze_share: Annotated[
        float, typer.Option(help="Of mix, the share of cloze.", rich_help_panel=_CONTRASTIVE)
    ] = 0.0,
    lexical_share: Annotated[
        float,
        typer.Option(
            help="Share of the contrastive batches that are of texts which share words, and teach "
            "that cosines of embeddings are those of the words, weighted by how rare they are.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = 0.0,
    teacher: Annotated[
        Path | None,
        typer.Option(
            help="A GEM checkpoint with the base's vocabulary: in these batches its cosines are "
            "taught as well as those of the words, half and half.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    stemmer: Annotated[
        str,
        typer.Option(
            help="For these words: Snowball's, by language, or none.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = "english",
    scale: Annotated[
        float,
        typer.Option(
            help="What cosines are multiplied by at first (1 / temperature); it is trained, too.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = 20.0,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric",
            help="Let positives look for their texts, too.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = False,
    matryoshka: Annotated[
        list[int] | None,
        typer.Option(
            help="Let so many leading numbers of an embedding be one, too (requests ask for them "
            "by `dimensions`). Can be given several times.",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    rows_per_pass: Annotated[
        int | None,
        typer.Option(
            help="Compute so many of a batch's texts at once, and again in the backward pass: "
            "memory for large batches, paid for in time.",
            show_default="all",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    packing: Annotated[
        bool,
        typer.Option(
            help="Of full and lora: pack short texts into longer sequences, so that no time goes "
            "into padding. (The adapter's texts go through the base by like lengths.)",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = True,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Of several processes: spread over them (FSDP2) the frozen base, or all weights "
            "where all are trained.",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = False,
    contrastive_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate.",
            show_default="adapter 5e-4, lora 1e-4, full 1e-5",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    alpha_schedule: Annotated[
        AlphaSchedule | None,
        typer.Option(
            help="How the weight of the contrastive loss (alpha) goes: 0 and then --alpha, a ramp, "
            "or always --alpha.",
            show_default="adapter constant, full and lora step",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="That weight, in the end.", rich_help_panel=_CONTRASTIVE)
    ] = 1.0,
    alpha_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps before alpha steps up, or of its ramp.",
            show_default="100, or a tenth of --steps where that is less",
            rich_help_panel=_CONTRASTIVE,
        ),
    ] = None,
    raw_share: Annotated[
        float | None,
        typer.Option(
            help="Share of texts without special tokens.",
            show_default="0.8, adapter 0",
            rich_help_panel=_NTP,
        ),
    ] = None,
    reconstruction_share: Annotated[
        float,
        typer.Option(
            help="Of the other texts, the share to be repeated from the special tokens; the rest "
            "is cut at a random place.",
            rich_help_panel=_NTP,
        ),
    ] = 0.5,
    ntp_learning_rate: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate.",
            show_default="full 1e-4, adapter and lora 5e-4",
            rich_help_panel=_NTP,
        ),
    ] = None,
    warmup_share: Annotated[
        float, typer.Option(help="Share of steps that warm up.", rich_help_panel=_OPTIMIZER)
    ] = 0.05,
    weight_decay: Annotated[
        float, typer.Option(help="Of AdamW.", rich_help_panel=_OPTIMIZER)
    ] = 0.0,
    max_grad_norm: Annotated[
        float, typer.Option(help="Longer gradients are clipped.", rich_help_panel=_OPTIMIZER)
    ] = 1.0,
    lora_rank: Annotated[
        int, typer.Option(help="Of the modes adapter and lora.", rich_help_panel=_OPTIMIZER)
    ] = 16,
    lora_alpha: Annotated[
        int, typer.Option(help="Of the modes adapter and lora.", rich_help_panel=_OPTIMIZER)
    ] = 32,
    lora_modules: Annotated[
        LoraModules,
        typer.Option(help="Which linear layers have it.", rich_help_panel=_OPTIMIZER),
    ] = "all",
    lora_last_layers: Annotated[
        int | None,
        typer.Option(
            help="Only so many of the last decoder layers have it.",
            show_default="all",
            rich_help_panel=_OPTIMIZER,
        ),
    ] = None,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints.", rich_help_panel=_RUN)
    ] = 100,
    keep_checkpoints: Annotated[
        int, typer.Option(help="How many of them stay while it trains.", rich_help_panel=_RUN)
    ] = 2,
    log_every: Annotated[
        int, typer.Option(help="Steps between log entries (TensorBoard).", rich_help_panel=_RUN)
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue an interrupted run; a finished one stays as it is.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Start anew over what --out holds.", rich_help_panel=_RUN),
    ] = False,
) -> None:
    """Teach a language model to embed text.

    The base model gets special tokens whose hidden states, behind a text, are its embedding; they
    are trained on plain text, without labels. The result is one folder that embeds and chats,
    ready for `vllm serve`. An example that takes a few minutes on a laptop:

    gem-vllm train --base models/SmolLM2-135M-Instruct --data texts.txt --out my-model --steps 60
    """
    from gem_vllm.training.options import TrainOptions
    from gem_vllm.training.run import train as run_training

    options = TrainOptions(
        base=base,
        data=tuple(data),
        out=out,
        mode=mode,
        special_tokens=special_tokens,
        pooling=pooling,
        instruction=instruction,
        text_field=text_field,
        pairs=pairs,
        pairs_share=pairs_share,
        held_out_pairs=held_out_pairs,
        patience=patience,
        steps=steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        seed=seed,
        dtype=dtype,
        raw_share=raw_share,
        reconstruction_share=reconstruction_share,
        ntp_learning_rate=ntp_learning_rate,
        positives=positives,
        drop_rate=drop_rate,
        anchor_drop_rate=anchor_drop_rate,
        span_share=span_share,
        span_tokens=span_tokens,
        cloze_share=cloze_share,
        lexical_share=lexical_share,
        teacher=teacher,
        stemmer=stemmer,
        scale=scale,
        symmetric=symmetric,
        matryoshka=tuple(matryoshka or ()),
        rows_per_pass=rows_per_pass,
        packing=packing,
        shard=shard,
        contrastive_learning_rate=contrastive_learning_rate,
        alpha_schedule=alpha_schedule,
        alpha=alpha,
        alpha_steps=alpha_steps,
        warmup_share=warmup_share,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_modules=lora_modules,
        lora_last_layers=lora_last_layers,
        save_every=save_every,
        keep_checkpoints=keep_checkpoints,
        log_every=log_every,
    )
    try:
        folder = run_training(options, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        run = options.run_folder
        typer.echo(f"interrupted; the checkpoints are in {run}: continue with --resume", err=True)
        raise typer.Exit(130) from None
    typer.echo(folder)
