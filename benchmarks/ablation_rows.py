"""What `ablations.py` compares: one recipe, and what is changed of it in each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# A short run, on a laptop; `--data` is paragraphs, then sentences.
RECIPE: dict[str, Any] = {
    "mode": "adapter",
    "steps": 80,
    "batch_size": 32,
    "positives": "mix",
    "drop_rate": 0.5,
    "span_share": 0.5,
}


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: of its folder and its result.
        title: in the table.
        changes: of `TrainOptions`, over ``RECIPE``.
        pairs: which file of pairs `ablations.py` makes for it: ``lead``, ``keywords``,
            ``questions``, ``questions-16k``, ``mined``.
        dimensions: further sizes at which embeddings are measured.
        taught: whether the model of the row ``base`` is its teacher.
        documents_of: the task of retrieval whose documents, without its queries, are its texts in
            place of paragraphs and sentences.
        on_gpu: whether it is trained on a GPU, and left out where there is none.
    """

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    pairs: str | None = None
    dimensions: tuple[int, ...] = ()
    taught: bool = False
    documents_of: str | None = None
    on_gpu: bool = False


TOGETHER: dict[str, Any] = {
    "instruction": " This means in one word:",
    "drop_rate": 0.8,
    "batch_size": 64,
    "rows_per_pass": 64,
    "lora_last_layers": 15,
    "steps": 160,
}
# Of four times as many questions, and with time.
LONGER: dict[str, Any] = {**TOGETHER, "pairs_share": 0.33, "rows_per_pass": 256}
# As the shipped adapter is trained, but for fewer steps and by another teacher.
LEXICAL: dict[str, Any] = {
    "lexical_share": 1.0,
    "batch_size": 64,
    "contrastive_learning_rate": 1.5e-3,
    "lora_rank": 32,
    "lora_alpha": 64,
    "lora_last_layers": 15,
}
SIZES = (64, 128, 256)
GROUPS: dict[str, list[Row]] = {
    "The recipe, by seed": [
        Row("base", "the recipe: k = 1, half spans, half dropout 50 %", dimensions=SIZES),
        Row("seed-1", "seed 1", {"seed": 1}),
        Row("seed-2", "seed 2", {"seed": 2}),
        Row("on-a-gpu", "seed 0, on a GPU", on_gpu=True),
    ],
    "Positives": [
        Row("spans", "spans alone", {"positives": "spans"}),
        Row("spans-192", "half spans of 192 tokens at most, half dropout 50 %",
            {"span_tokens": 192}),
        Row("dropout-50", "dropout 50 % alone", {"positives": "dropout"}),
        Row("dropout-80", "dropout 80 % alone", {"positives": "dropout", "drop_rate": 0.8}),
        Row("drop-30", "half spans, half dropout 30 %", {"drop_rate": 0.3}),
        Row("drop-70", "half spans, half dropout 70 %", {"drop_rate": 0.7}),
        Row("both-dropped", "half spans, half 30 % dropped on both sides",
            {"drop_rate": 0.3, "anchor_drop_rate": 0.3}),
        Row("masks-30", "two masks of 30 %", {"positives": "masks", "drop_rate": 0.3}),
        Row("cloze", "a third each of spans, cloze and dropout",
            {"span_share": 0.34, "cloze_share": 0.33}),
        Row("cloze-alone", "cloze alone", {"positives": "cloze"}),
        Row("lead", "a quarter of first sentences and the rest (title and body)", pairs="lead"),
        Row("keywords", "a quarter of a few words of a paragraph, rare ones rather, and all of it",
            pairs="keywords"),
        Row("questions", "a quarter of questions that the base has written, and their passages",
            pairs="questions"),
    ],
    "Words": [
        Row("words-half", "half of the batches lexical", {"lexical_share": 0.5}),
        Row("words", "all batches lexical", {"lexical_share": 1.0}),
        Row("words-64", "the same, batches of 64, rank 32 on the last 15 layers, rate 1.5e-3",
            LEXICAL),
        Row("words-taught", "the same, with the recipe's model as the teacher", LEXICAL,
            taught=True),
        Row("words-own", "batches of 64 as above, of Cranfield's own documents, not its queries",
            LEXICAL, documents_of="Cranfield"),
        Row("words-own-taught", "the same, with the recipe's model as the teacher", LEXICAL,
            taught=True, documents_of="Cranfield"),
        Row("words-lora", "batches of 64 as above, a LoRA on every token, rate 5e-4",
            {**LEXICAL, "mode": "lora", "alpha_schedule": "constant",
             "contrastive_learning_rate": 5e-4}),
    ],
    "Negatives": [
        Row("batch-64", "batches of 64", {"batch_size": 64, "rows_per_pass": 64}),
        Row("batch-128", "batches of 128", {"batch_size": 128, "rows_per_pass": 64}),
        Row("batch-128-short", "batches of 128, a quarter of the steps",
            {"batch_size": 128, "rows_per_pass": 64, "steps": 20}),
        Row("mined", "a quarter with four mined negatives each", pairs="mined"),
        Row("symmetric", "positives look for their texts, too", {"symmetric": True}),
    ],
    "Special tokens": [
        *(Row(f"k{k}-{pooling}", f"k = {k}, {pooling}", {"special_tokens": k, "pooling": pooling})
          for k in (2, 4, 8, 16) for pooling in ("mean", "concat")),
    ],
    "Matryoshka": [
        Row("matryoshka", "trained at 64, 128 and 256 numbers, too", {"matryoshka": SIZES},
            dimensions=SIZES),
    ],
    "LoRA": [
        Row("rank-4", "rank 4", {"lora_rank": 4, "lora_alpha": 8}),
        Row("rank-64", "rank 64", {"lora_rank": 64, "lora_alpha": 128}),
        Row("attention", "attention's layers alone", {"lora_modules": "attention"}),
        Row("mlp", "the MLP's layers alone", {"lora_modules": "mlp"}),
        Row("last-15", "the last 15 of 30 layers", {"lora_last_layers": 15}),
    ],
    "Optimizer": [
        Row("rate-2.5e-4", "learning rate 2.5e-4", {"contrastive_learning_rate": 2.5e-4}),
        Row("rate-1e-3", "learning rate 1e-3", {"contrastive_learning_rate": 1e-3}),
        Row("scale-50", "temperature from 1 / 50", {"scale": 50.0}),
    ],
    "Instruction before the special tokens": [
        Row("instruction", "' This means in one word:'",
            {"instruction": " This means in one word:"}),
    ],
    "What was good alone, together": [
        Row("together", "instruction, half dropout 80 %, batches of 64, last 15 layers, 160 steps",
            TOGETHER),
        Row("together-questions", "the same, a third of the batches questions",
            {**TOGETHER, "pairs_share": 0.33}, pairs="questions"),
        Row("together-questions-bare", "the same without the instruction",
            {**TOGETHER, "pairs_share": 0.33, "instruction": ""}, pairs="questions"),
    ],
    "Larger and longer, on a GPU; questions about 16,000 paragraphs": [
        Row(f"longer-{batch}-{steps}", f"{steps} steps of {batch}",
            {**LONGER, "batch_size": batch, "steps": steps}, pairs="questions-16k", on_gpu=True)
        for batch, steps in ((64, 160), (64, 320), (64, 640), (128, 320))
    ],
    "Next-token prediction": [
        Row("ntp", "80 steps of it before",
            {"steps": 160, "alpha_schedule": "step", "alpha_steps": 80}),
        Row("ntp-beside", "beside, alpha 0.5", {"alpha": 0.5}),
    ],
    "All weights": [
        Row("full", "the paper's recipe: 80 steps of mixed next-token prediction, then contrastive",
            {"mode": "full", "steps": 160, "alpha_steps": 80, "positives": "dropout",
             "drop_rate": 0.3}),
        Row("lora", "the recipe, a LoRA on every token",
            {"mode": "lora", "alpha_schedule": "constant", "contrastive_learning_rate": 5e-4}),
    ],
}  # fmt: skip
