"""Batches of a run, in an order that depends on the seed alone, so that a run can be resumed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset

from gem_vllm.errors import GemError
from gem_vllm.training.data import TextSource, shuffled
from gem_vllm.training.losses import alpha_at
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.positives import MIN_SPAN_TOKENS, cloze_pair, dropout_pair, span_pair
from gem_vllm.training.sequences import Template, mixed_sequence, pad

TOKENIZE_AT_ONCE = 256


class TrainBatches(IterableDataset):
    """The batches of steps ``start_step`` to ``options.steps - 1``.

    A batch is a dict: ``alpha`` (float32 scalar); where alpha > 0, ``cl_ids`` int64 [2N, T] and
    ``cl_lengths`` [2N], N anchors and then their N positives; where alpha < 1, ``ntp_ids`` and
    ``ntp_lengths``, N rows of mixed next-token prediction. Rows are right-padded.

    Several sources take turns, one batch each. ``mix`` takes shares of its batches from the first
    source, as spans and as cloze pairs, and the others from the last, with dropout, evenly spread.
    What is random in step s is drawn from (seed, s), and texts are read again from the start when
    they run out, in another order.
    """

    def __init__(self, options: TrainOptions, tokenizer: Any, special_ids: tuple[int, ...]) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.special_ids = special_ids
        self.start_step = 0
        self.template = plain_prompt_template(tokenizer)
        self.sources = [TextSource(spec, options.text_field) for spec in options.data]
        self.max_content = (
            options.max_tokens
            - len(special_ids)
            - len(self.template.head)
            - len(self.template.tail)
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        streams = [self._contents(index) for index in range(len(self.sources))]
        for step, (kind, source) in zip(range(self.options.steps), self._turns(), strict=False):
            contents = [next(streams[source]) for _ in range(self.options.batch_size)]
            if step >= self.start_step:
                yield self._batch(contents, step, kind)

    def check(self) -> None:
        """Read the first batch of every source; raise GemError where that cannot be done."""
        for index, source in enumerate(self.sources):
            source.check()
            stream = self._contents(index)
            for _ in range(self.options.batch_size):
                next(stream)

    def _turns(self) -> Iterator[tuple[str, int]]:
        """Kind of pair and source of each step."""
        options, last = self.options, len(self.sources) - 1
        if options.positives != "mix":
            yield from ((options.positives, step % (last + 1)) for step in itertools.count())
        shares = {"spans": options.span_share, "cloze": options.cloze_share}
        shares["dropout"] = 1.0 - sum(shares.values())
        taken = dict.fromkeys(shares, 0)
        for step in itertools.count(1):
            # Whichever is furthest behind its share.
            kind = max(shares, key=lambda kind: shares[kind] * step - taken[kind])
            taken[kind] += 1
            yield kind, last if kind == "dropout" else 0

    def _contents(self, index: int) -> Iterator[list[int]]:
        """Token ids of a source's texts, for ever; texts under 8 tokens are left out."""
        source, epoch = self.sources[index], 0
        while True:
            rng = random.Random(f"{self.options.seed}/{index}/{epoch}")
            kept = 0
            for token_ids in self._tokenized(shuffled(source, rng)):
                if len(token_ids) >= MIN_SPAN_TOKENS:
                    kept += 1
                    yield token_ids[: self.max_content]
            if kept < self.options.batch_size:
                raise GemError(
                    f"--data {source.spec} holds {kept} texts of at least {MIN_SPAN_TOKENS} tokens;"
                    f" a batch needs {self.options.batch_size}: give more text, or --batch-size"
                )
            epoch += 1

    def _tokenized(self, texts: Iterator[str]) -> Iterator[list[int]]:
        chunk: list[str] = []
        for text in texts:
            chunk.append(text)
            if len(chunk) == TOKENIZE_AT_ONCE:
                yield from self.tokenizer(chunk, add_special_tokens=False)["input_ids"]
                chunk.clear()
        if chunk:
            yield from self.tokenizer(chunk, add_special_tokens=False)["input_ids"]

    def _batch(self, contents: list[list[int]], step: int, kind: str) -> dict[str, torch.Tensor]:
        options, rng = self.options, random.Random(f"{self.options.seed}/{step}")
        alpha = alpha_at(
            step,
            options.alpha_schedule,
            value=options.alpha,
            switch_step=options.alpha_steps,
        )
        batch = {"alpha": torch.tensor(alpha)}
        if alpha > 0.0:
            pairs = [self._pair(content, kind, rng) for content in contents]
            rows = [self.template.wrap(pair[side]) for side in (0, 1) for pair in pairs]
            batch["cl_ids"], batch["cl_lengths"] = pad(rows)
        if alpha < 1.0:
            rows = [
                mixed_sequence(
                    content,
                    self.special_ids,
                    self.template,
                    raw_share=options.raw_share,
                    reconstruction_share=options.reconstruction_share,
                    max_tokens=options.max_tokens,
                    rng=rng,
                )
                for content in contents
            ]
            batch["ntp_ids"], batch["ntp_lengths"] = pad(rows)
        return batch

    def _pair(
        self, content: list[int], kind: str, rng: random.Random
    ) -> tuple[list[int], list[int]]:
        if kind == "spans":
            return span_pair(content, rng)
        if kind == "cloze":
            return cloze_pair(content, rng)
        options = self.options
        return dropout_pair(content, options.drop_rate, rng, anchor_rate=options.anchor_drop_rate)


def plain_prompt_template(tokenizer: Any) -> Template:
    """What ``tokenizer`` puts before and after a plain prompt."""
    content = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(content) + 1):
        if whole[start : start + len(content)] == content:
            return Template(tuple(whole[:start]), tuple(whole[start + len(content) :]))
    raise GemError("the base's tokenizer changes a plain prompt's own tokens; it cannot be used")
