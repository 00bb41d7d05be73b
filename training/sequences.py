"""Sequences of mixed next-token prediction (arXiv 2506.04344, section 3.1), and their loss mask."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gem_vllm.errors import GemError

IGNORE = -100


@dataclass(frozen=True)
class Template:
    """What the tokenizer puts around a plain prompt (a BOS, say), and an instruction behind it.

    Both are kept whole by every cut.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    instruction: tuple[int, ...] = ()

    def wrap(self, content: Sequence[int]) -> list[int]:
        """Token ids of a text as a plain prompt has them."""
        return [*self.head, *content, *self.tail]

    def wrap_to_embed(self, content: Sequence[int]) -> list[int]:
        """All that is in front of the special tokens when a text is embedded."""
        return [*self.wrap(content), *self.instruction]

    @property
    def length(self) -> int:
        """Tokens beside a text's own."""
        return len(self.wrap_to_embed(()))


def plain_prompt_template(tokenizer: Any) -> Template:
    """What ``tokenizer`` puts before and after a plain prompt."""
    content = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(content) + 1):
        if whole[start : start + len(content)] == content:
            return Template(tuple(whole[:start]), tuple(whole[start + len(content) :]))
    raise GemError("the base's tokenizer changes a plain prompt's own tokens; it cannot be used")


def instruction_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of an instruction between texts and special tokens."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()


def mixed_sequence(
    content: list[int],
    special_ids: Sequence[int],
    template: Template,
    *,
    raw_share: float,
    reconstruction_share: float,
    max_tokens: int,
    rng: random.Random,
) -> list[int]:
    """One row: raw text with probability ``raw_share``, else with the special tokens inserted.

    Of the rest, ``reconstruction_share`` are ``text | special | text``, the others the text cut at
    a random position, ``prefix | special | suffix``. Never longer than ``max_tokens``: a text to be
    reconstructed is cut to what fits twice.
    """
    if rng.random() < raw_share:
        return template.wrap(content)[:max_tokens]
    room = max_tokens - len(special_ids) - len(template.head) - len(template.instruction)
    if rng.random() < reconstruction_share:
        prefix = suffix = content[: room // 2]
    else:
        content = content[:room]
        cut = rng.randrange(1, len(content))
        prefix, suffix = content[:cut], content[cut:]
    return [*template.head, *prefix, *template.instruction, *special_ids, *suffix]


def pad(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-pad rows of token ids, by zeros that nothing looks at: int64 [N, T], lengths [N]."""
    lengths = torch.tensor([len(row) for row in rows])
    token_ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row_ids, row in zip(token_ids, rows, strict=True):
        row_ids[: len(row)] = torch.tensor(row)
    return token_ids, lengths


def next_token_targets(
    token_ids: torch.Tensor,
    lengths: torch.Tensor,
    special_ids: Sequence[int],
    instruction_tokens: int = 0,
) -> torch.Tensor:
    """What each position is to predict: int64 [N, T], ``IGNORE`` where it predicts nothing.

    The loss mask: where the label is a special token (or padding) nothing is predicted. So of a run
    only the last special token predicts: the suffix's first token, from which decoding from special
    tokens alone starts (appendix B). Nor are the ``instruction_tokens`` in front of a run: no text
    goes on with an instruction.
    """
    targets = torch.full_like(token_ids, IGNORE)
    targets[:, :-1] = token_ids[:, 1:]
    position = torch.arange(token_ids.shape[1], device=token_ids.device)
    special = torch.isin(targets, torch.tensor(special_ids, device=token_ids.device))
    unpredicted = special | (position >= lengths[:, None] - 1)
    for before in range(1, instruction_tokens + 1):
        # The label is in front of a run, by so many tokens.
        unpredicted[:, :-before] |= special[:, before:]
    return targets.masked_fill(unpredicted, IGNORE)
