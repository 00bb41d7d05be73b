"""Batches of a run, in an order that depends on the seed alone, so that a run can be resumed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.data import TextSource, shuffled
from gem_vllm.training.lexical import Neighbourhoods
from gem_vllm.training.options import TrainOptions
from gem_vllm.training.pairs import PairSource
from gem_vllm.training.positives import (
    MIN_SPAN_TOKENS,
    cloze_pair,
    dropout_pair,
    passage,
    shared_texts,
    span_pair,
)
from gem_vllm.training.sequences import (
    Template,
    instruction_ids,
    mixed_sequence,
    pad,
    plain_prompt_template,
)

TOKENIZE_AT_ONCE = 256
NEGATIVES_PER_PAIR = 4
# Of a text, for every token that may be used, so that memory does not grow with its length.
CHARACTERS = 64
# Held in memory at once, of all sources together, to find texts that share words; of each, so many
# characters for every token that may be used.
LEXICAL_TEXTS = 1 << 16
LEXICAL_CHARACTERS = 8

# Token ids of texts (an anchor, a positive, negatives), and the rows that are made of them.
_Drawn = tuple[list[list[int]], list[list[int]]]


class TrainBatches(IterableDataset):
    """The batches of steps ``start_step`` to ``options.steps - 1``.

    A batch is a dict: ``alpha`` (float32 scalar); where alpha > 0, ``cl_ids`` int64 [2N + M, T] and
    ``cl_lengths`` [2N + M], N anchors, their N positives, and M negatives of labelled pairs;
    ``cl_pairs`` is N; with ``masks`` also ``cl_seen``, bool [2N, T], the tokens of a text that the
    special tokens behind it are to see; where texts repeat, ``cl_repeats``, bool [N, N + M], what
    else is of a pair's own texts, and so not among its negatives; where alpha < 1, ``ntp_ids`` and
    ``ntp_lengths``, N rows of mixed next-token prediction. Rows are right-padded. A lexical batch
    has, instead of pairs, ``lex_ids`` and ``lex_lengths`` of N texts, and ``lex_similar``, float32
    [N, N of all processes]: the cosines of their words (`lexical`), -inf of a text with itself.

    Several sources take turns, one batch each. ``mix`` takes shares of its batches from the first
    source, as spans and as cloze pairs, and the others from the last, with dropout, evenly spread.
    A share of all contrastive batches is of labelled pairs, where there are some, and a share is
    lexical, of all sources.

    What is random in step s is drawn from (seed, s), and texts are read again from the start when
    they run out, in another order. Of several processes (`peers`) each gives an equal part of every
    batch, so that together they see what one would.
    """

    def __init__(self, options: TrainOptions, tokenizer: Any, special_ids: tuple[int, ...]) -> None:
        self.options = options
        self.tokenizer = tokenizer
        self.special_ids = special_ids
        self.start_step = 0
        plain = plain_prompt_template(tokenizer)
        self.template = Template(
            plain.head, plain.tail, instruction_ids(tokenizer, options.instruction)
        )
        self.sources = [TextSource(spec, options.text_field) for spec in options.data]
        self.pairs = None if options.pairs is None else PairSource(Path(options.pairs))
        self.max_content = options.max_tokens - len(special_ids) - self.template.length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        options = self.options
        streams = [self._contents(index) for index in range(len(self.sources))]
        turns, pairs, pools = self._turns(), self._labelled(), self._pools()
        contrastive = pairs_taken = lexical_taken = 0
        for step in range(options.steps):
            rng = random.Random(f"{options.seed}/{step}")
            alpha = self.options.alpha_of(step)
            contrastive += alpha > 0.0
            labelled: list[_Drawn] = []
            if alpha > 0.0 and self.pairs and options.pairs_share * contrastive > pairs_taken:
                labelled = [next(pairs) for _ in range(options.batch_size)]
                pairs_taken += 1
            pool = None
            if alpha > 0.0 and not labelled and options.lexical_share * contrastive > lexical_taken:
                pool = next(pools)
                lexical_taken += 1
            contents: list[list[int]] = []
            if not (labelled or pool) or alpha < 1.0:
                kind, source = next(turns)
                contents = [next(streams[source]) for _ in range(options.batch_size)]
            if step < self.start_step:
                continue
            batch = {"alpha": torch.tensor(alpha)}
            if pool is not None:
                batch |= self._lexical(pool, rng)
            elif alpha > 0.0:
                drawn = labelled or [
                    ([content, content], self._pair(content, kind, rng)) for content in contents
                ]
                texts, rows = zip(*drawn, strict=True)
                batch |= self._contrastive(rows[self._own])
                repeats = shared_texts(texts)
                if repeats.any():
                    batch["cl_repeats"] = repeats[self._own]
                if not labelled and kind == "masks":
                    batch["cl_seen"] = self._seen(rows, f"{options.seed}/{step}")
            if alpha < 1.0:
                batch |= self._next_token(contents, rng)
            yield batch

    @property
    def _own(self) -> slice:
        """This process's part of a batch."""
        part = self.options.batch_size // peers.count()
        return slice(peers.rank() * part, (peers.rank() + 1) * part)

    def check(self) -> None:
        """Read the first batch of every source; raise GemError where that cannot be done."""
        if self.options.batch_size % peers.count():
            raise GemError(
                f"--batch-size {self.options.batch_size} does not go into equal parts for "
                f"{peers.count()} processes"
            )
        if self.max_content < MIN_SPAN_TOKENS:
            missing = MIN_SPAN_TOKENS - self.max_content
            raise GemError(
                f"--max-tokens must be at least {self.options.max_tokens + missing}: --instruction "
                f"takes {len(self.template.instruction)} tokens, and a text {MIN_SPAN_TOKENS} or "
                "more; or give a shorter instruction"
            )
        for index, source in enumerate(self.sources):
            source.check()
            stream = self._contents(index)
            for _ in range(self.options.batch_size):
                next(stream)
        if self.pairs:
            self.pairs.check()
            labelled = self._labelled()
            for _ in range(self.options.batch_size):
                next(labelled)

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
            texts = (text[: CHARACTERS * self.max_content] for text in source)
            for token_ids in self._tokenized(shuffled(texts, rng)):
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

    def _labelled(self) -> Iterator[_Drawn]:
        """Labelled pairs, each with some of its negatives, for ever."""
        epoch = 0
        while self.pairs:
            rng = random.Random(f"{self.options.seed}/pairs/{epoch}")
            count = 0
            for pair in shuffled(self.pairs, rng):
                count += 1
                kept = rng.sample(pair.negatives, min(len(pair.negatives), NEGATIVES_PER_PAIR))
                texts = [pair.anchor, pair.positive or pair.anchor, *kept]
                ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
                ids = [row[: self.max_content] for row in ids]
                made = self._pair(ids[0], "dropout", rng) if pair.positive is None else ids[:2]
                yield ids, [*made, *ids[2:]]
            if count < self.options.batch_size:
                raise GemError(
                    f"--pairs {self.pairs.file} holds {count} pairs; a batch needs "
                    f"{self.options.batch_size}: give more pairs, or a smaller --batch-size"
                )
            epoch += 1

    def _pools(self) -> Iterator[Neighbourhoods]:
        """For each lexical batch the texts that it is drawn from, which are read a pool at a time.

        A pool serves as many batches as it has texts for.
        """
        options, epoch = self.options, 0
        while True:
            pooled: list[Iterator[str]] = []
            for index, source in enumerate(self.sources):
                rng = random.Random(f"{options.seed}/{index}/lexical/{epoch}")
                texts = (text[: LEXICAL_CHARACTERS * self.max_content] for text in source)
                pooled.append(shuffled(texts, rng))
            while drawn := self._pool(pooled):
                pool = Neighbourhoods(drawn, options.stemmer)
                for _ in range(max(1, len(drawn) // options.batch_size)):
                    yield pool
            epoch += 1

    def _pool(self, pooled: list[Iterator[str]]) -> list[str]:
        share = LEXICAL_TEXTS // len(pooled)
        return [text for texts in pooled for text in itertools.islice(texts, share)]

    def _lexical(self, pool: Neighbourhoods, rng: random.Random) -> dict[str, torch.Tensor]:
        texts = pool.draw(self.options.batch_size, rng)
        contents = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [passage(content[: self.max_content], rng) for content in contents]
        similar = pool.similarities(self.tokenizer.batch_decode(rows)).fill_diagonal_(-torch.inf)
        ids, lengths = pad([self.template.wrap_to_embed(row) for row in rows[self._own]])
        return {"lex_ids": ids, "lex_lengths": lengths, "lex_similar": similar[self._own]}

    def _contrastive(self, pairs: Sequence[list[list[int]]]) -> dict[str, torch.Tensor]:
        rows = [pair[side] for side in (0, 1) for pair in pairs]
        rows += [negative for pair in pairs for negative in pair[2:]]
        ids, lengths = pad([self.template.wrap_to_embed(row) for row in rows])
        return {"cl_ids": ids, "cl_lengths": lengths, "cl_pairs": torch.tensor(len(pairs))}

    def _seen(self, pairs: Sequence[list[list[int]]], seed: str) -> torch.Tensor:
        """Two masks of each text: a share of its tokens hidden, the first one (a BOS) never.

        Nor is an instruction.
        """
        lengths = [len(self.template.wrap_to_embed(anchor)) for anchor, _ in pairs]
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        shape = (2, len(pairs), max(lengths))
        assert self.options.drop_rate is not None
        seen = torch.rand(shape, generator=generator) >= self.options.drop_rate
        seen[:, :, 0] = True
        for row, length in enumerate(lengths):
            seen[:, row, length - len(self.template.instruction) : length] = True
        return seen[:, self._own, : max(lengths[self._own])].flatten(0, 1)

    def _next_token(self, contents: list[list[int]], rng: random.Random) -> dict[str, torch.Tensor]:
        options = self.options
        assert options.raw_share is not None
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
        ids, lengths = pad(rows[self._own])
        return {"ntp_ids": ids, "ntp_lengths": lengths}

    def _pair(self, content: list[int], kind: str, rng: random.Random) -> list[list[int]]:
        if kind == "spans":
            return [*span_pair(content, rng, longest=self.options.span_tokens)]
        if kind == "cloze":
            return [*cloze_pair(content, rng)]
        if kind == "masks":
            return [content, content]
        options = self.options
        rate, anchor_rate = options.drop_rate, options.anchor_drop_rate
        assert rate is not None
        return [*dropout_pair(content, rate, rng, anchor_rate=anchor_rate)]
