"""The order of batches depends on the seed alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from itertools import combinations, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from gem_vllm.errors import GemError
from gem_vllm.training.batches import TrainBatches
from gem_vllm.training.options import TrainOptions
from tests.tiny import make_tiny_tokenizer

SPECIAL = (900, 901)
Make = Callable[..., TrainBatches]


@pytest.fixture
def make(texts: Path, tmp_path: Path) -> Make:
    def make_batches(add_bos: bool = True, **changes: Any) -> TrainBatches:
        options = TrainOptions(
            base=tmp_path,
            data=(str(texts),),
            out=tmp_path / "out",
            special_tokens=2,
            steps=12,
            batch_size=16,
        )
        options = dataclasses.replace(options, **changes)
        return TrainBatches(options, make_tiny_tokenizer(add_bos=add_bos), SPECIAL)

    return make_batches


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_a_later_start_gives_the_same_batches(make: Make) -> None:
    # 12 steps of 16 texts go through the 80 texts more than twice.
    whole = list(make())
    later = make()
    later.start_step = 7
    assert all(same(*pair) for pair in zip(whole[7:], later, strict=True))
    assert not any(same(*pair) for pair in pairwise(whole))


def test_another_seed_gives_other_batches(make: Make) -> None:
    assert not any(same(*pair) for pair in zip(make(), make(seed=1), strict=True))


def test_alpha_decides_what_a_batch_holds(make: Make) -> None:
    batches = list(make(alpha_schedule="linear", alpha_steps=10, raw_share=0.5))
    contrastive, ntp = {"cl_ids", "cl_lengths", "cl_pairs"}, {"ntp_ids", "ntp_lengths"}
    assert batches[0].keys() == {"alpha"} | ntp
    assert batches[5].keys() == {"alpha"} | ntp | contrastive
    assert batches[10].keys() == {"alpha"} | contrastive


def test_few_steps_are_contrastive_for_the_most_part(options: TrainOptions) -> None:
    for steps, first in ((30, 3), (1000, 100), (5000, 100)):
        short = TrainOptions(
            base=options.base, data=options.data, out=options.out, mode="lora", steps=steps
        )
        assert (short.alpha_schedule, short.alpha_steps) == ("step", first)


def rows_of(batch: dict[str, torch.Tensor]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of a batch's anchors, and of their positives."""
    lengths, count = batch["cl_lengths"].tolist(), int(batch["cl_pairs"])
    rows = [row[:n].tolist() for row, n in zip(batch["cl_ids"], lengths, strict=True)]
    return rows[:count], rows[count : 2 * count]


def test_each_side_drops_its_own_share(make: Make) -> None:
    whole = sum(len(text) for batch in make(add_bos=False) for text in rows_of(batch)[0])
    found = [rows_of(batch) for batch in make(add_bos=False, drop_rate=0.7, anchor_drop_rate=0.2)]
    for side, kept in ((0, 0.8), (1, 0.3)):
        left = sum(len(row) for batch in found for row in batch[side])
        assert left / whole == pytest.approx(kept, abs=0.05)


def test_spans_are_no_longer_than_they_may_be(make: Make) -> None:
    batches = make(add_bos=False, positives="spans", span_tokens=12)
    lengths = torch.cat([batch["cl_lengths"] for batch in batches])
    assert (int(lengths.min()), int(lengths.max())) == (8, 12)


def test_cloze_pairs_are_a_span_and_the_rest(make: Make) -> None:
    texts = [text for batch in make(add_bos=False) for text in rows_of(batch)[0]]
    batches = map(rows_of, make(add_bos=False, positives="cloze"))
    pairs = [pair for batch in batches for pair in zip(*batch, strict=True)]
    parted = 0
    for text, (query, rest) in zip(texts, pairs, strict=True):
        starts = [n for n in range(len(text)) if text[n : n + len(query)] == query]
        without = [text[:n] + text[n + len(query) :] for n in starts]
        assert starts
        assert rest == text or rest in without
        parted += rest in without
    assert parted > len(texts) / 10


@pytest.mark.parametrize(
    ("mode", "positives", "rate"),
    [
        ("adapter", "dropout", 0.8),
        ("adapter", "mix", 0.8),
        ("adapter", "masks", 0.3),
        ("full", "dropout", 0.3),
        ("full", "masks", 0.3),
        ("lora", "dropout", 0.3),
    ],
)
def test_an_adapters_positives_lose_more(
    tmp_path: Path, mode: Any, positives: Any, rate: float
) -> None:
    files: dict[str, Any] = {"base": tmp_path, "data": ("texts.txt",), "out": tmp_path / "out"}
    options = TrainOptions(**files, mode=mode, positives=positives)
    assert options.drop_rate == rate
    told = TrainOptions(**files, mode=mode, positives=positives, drop_rate=0.5)
    assert told.drop_rate == 0.5


@pytest.mark.parametrize("add_bos", [True, False])
def test_rows_are_plain_prompts(make: Make, add_bos: bool) -> None:
    batches = make(add_bos=add_bos, max_tokens=20)
    bos = batches.tokenizer.bos_token_id
    for batch in batches:
        assert batch["cl_ids"].shape[0] == 32
        assert (batch["cl_ids"][:, 0] == bos).all() == add_bos
        assert batch["cl_lengths"].max() <= 20 - len(SPECIAL)
        assert not torch.isin(batch["cl_ids"], torch.tensor(SPECIAL)).any()


def test_mix_takes_turns(make: Make, texts: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("the lazy dog of the old stone bridge\n" * 40)
    batches = make(add_bos=False, positives="mix", data=(str(texts), str(other)), drop_rate=0.5)
    for step, batch in enumerate(batches):
        anchors = {tuple(row) for row in batch["cl_ids"][:16].tolist()}
        assert (len(anchors) == 1) == (step % 2 == 1), "dropout has the one text of the other file"


@pytest.mark.parametrize(
    ("spans", "cloze", "kinds"),
    [
        (0.0, 0.0, "dddddddddddd"),
        (0.25, 0.0, "dsdddsdddsdd"),
        (0.5, 0.0, "sdsdsdsdsdsd"),
        (1.0, 0.0, "ssssssssssss"),
        (0.25, 0.5, "csdccsdccsdc"),
        (0.0, 1.0, "cccccccccccc"),
    ],
)
def test_shares_of_the_mix(make: Make, spans: float, cloze: float, kinds: str) -> None:
    batches = make(positives="mix", span_share=spans, cloze_share=cloze)
    assert "".join(kind[0] for kind, _ in islice(batches._turns(), 12)) == kinds


def test_a_share_is_of_texts_that_share_words(make: Make, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, [{"anchor": "the river", "positive": "a bridge"}] * 16)
    changes = {"lexical_share": 0.5, "pairs": pairs, "pairs_share": 0.25, "max_tokens": 20}
    batches = list(make(add_bos=False, **changes))
    kinds = "".join(
        "w" if "lex_ids" in batch else "p" if "cl_repeats" in batch else "." for batch in batches
    )
    assert kinds == "pww.pww.pww."
    plain = make().tokenizer
    for batch in batches:
        assert ("lex_ids" in batch) != ("cl_ids" in batch)
        if "lex_ids" not in batch:
            continue
        ids, lengths, similar = batch["lex_ids"], batch["lex_lengths"], batch["lex_similar"]
        assert len(ids) == len(lengths) == 16
        assert lengths.max() <= 20 - len(SPECIAL)
        assert (similar.diagonal() == -torch.inf).all()
        torch.testing.assert_close(similar, similar.T)
        said = [set(plain.decode(row[:n]).split()) for row, n in zip(ids, lengths, strict=True)]
        for first, second in combinations(range(16), 2):
            assert bool(similar[first, second] > 0) == bool(said[first] & said[second])
    later = make(add_bos=False, **changes)
    later.start_step = 7
    assert all(same(*pair) for pair in zip(batches[7:], later, strict=True))


def test_two_masks_of_each_text(make: Make) -> None:
    for batch in make(positives="masks", drop_rate=0.5):
        anchors, positives = batch["cl_ids"].chunk(2)
        assert torch.equal(anchors, positives)
        first, second = batch["cl_seen"].chunk(2)
        assert not torch.equal(first, second)
        assert batch["cl_seen"][:, 0].all()
        assert 0.3 < batch["cl_seen"][:, 1:].float().mean() < 0.7
    (asked, *_) = make(positives="masks", drop_rate=0.9, instruction=" in a word:")
    rows = zip(asked["cl_seen"], asked["cl_lengths"], strict=True)
    assert all(seen[length - 3 : length].all() for seen, length in rows), "of the instruction"
    later = make(positives="masks", drop_rate=0.5)
    later.start_step = 11
    assert same(batch, next(iter(later)))


def test_too_few_texts_are_refused(make: Make, tmp_path: Path) -> None:
    few = tmp_path / "few.txt"
    few.write_text("a\n" * 50 + "the lazy dog of the old stone bridge\n" * 3)
    with pytest.raises(GemError, match="holds 3 texts of at least 8 tokens"):
        make(data=(str(few),)).check()


def test_texts_that_repeat_are_no_negatives(make: Make, tmp_path: Path) -> None:
    assert not any("cl_repeats" in batch for batch in make())
    rows = [{"anchor": f"the old river {n}", "negative": "a bridge"} for n in range(8)]
    file = write_pairs(tmp_path, rows * 2)
    for batch in make(pairs=file, pairs_share=1.0, anchor_drop_rate=0.3):
        assert batch["cl_repeats"].shape == (16, 16 + 16)
        assert (batch["cl_repeats"].sum(dim=1) == 1).all(), "the same line, drawn again"


def test_an_instruction_that_leaves_no_room_is_refused(make: Make) -> None:
    instruction = " in a word:" * 4
    taken = len(make(instruction=instruction).template.instruction)
    needed = 1 + 8 + taken + len(SPECIAL)  # a BOS, a text
    make(instruction=instruction, max_tokens=needed).check()
    with pytest.raises(GemError, match=f"at least {needed}: --instruction takes {taken} tokens"):
        make(instruction=instruction, max_tokens=needed - 1).check()


def write_pairs(folder: Path, rows: list[Any]) -> str:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_labelled_pairs_take_their_share(make: Make, tmp_path: Path) -> None:
    pairs = [
        {"anchor": "the river", "positive": "a bridge", "negative": ["bread"] * (number % 3)}
        for number in range(18)
    ]
    file = write_pairs(tmp_path, pairs)
    batches = make(add_bos=False, pairs=file, pairs_share=0.25)
    river = batches.tokenizer("the river", add_special_tokens=False)["input_ids"]
    for step, batch in enumerate(batches):
        rows = [
            row[:length].tolist()
            for row, length in zip(batch["cl_ids"], batch["cl_lengths"], strict=True)
        ]
        assert batch["cl_pairs"] == 16
        assert all(row == river for row in rows[:16]) == (step % 4 == 0)
        assert (len(rows) > 32) == (step % 4 == 0), "negatives come with labelled pairs only"
    later = make(add_bos=False, pairs=file, pairs_share=0.25)
    later.start_step = 6
    whole = list(make(add_bos=False, pairs=file, pairs_share=0.25))
    assert all(same(*two) for two in zip(whole[6:], later, strict=True))


def test_the_share_is_of_the_contrastive_batches(make: Make, tmp_path: Path) -> None:
    file = write_pairs(tmp_path, [{"anchor": "the river", "positive": "a bridge"}] * 16)
    batches = make(
        add_bos=False, pairs=file, pairs_share=0.25, alpha_schedule="step", alpha_steps=4
    )
    widths = [batch["cl_ids"].shape[1] for batch in batches if "cl_ids" in batch]
    assert [width == min(widths) for width in widths] == [True, False, False, False] * 2


def test_labelled_pairs_leave_the_other_batches_as_they_are(make: Make, tmp_path: Path) -> None:
    file = write_pairs(tmp_path, [{"anchor": "the river", "positive": "a bridge"}] * 16)
    ntp = list(make(alpha_schedule="constant", alpha=0.5, raw_share=0.5))
    both = list(make(alpha_schedule="constant", alpha=0.5, raw_share=0.5, pairs=file))
    names = ("ntp_ids", "ntp_lengths")
    assert both[0]["cl_ids"].shape != ntp[0]["cl_ids"].shape
    assert same(*({name: batches[1][name] for name in names} for batches in (ntp, both)))


def test_a_pair_without_positive_gets_one_with_tokens_dropped(make: Make, tmp_path: Path) -> None:
    anchor = "the lazy dog of the old stone bridge"
    file = write_pairs(tmp_path, [{"anchor": anchor, "negative": ["bread and water"]}] * 16)
    batch = next(iter(make(add_bos=False, pairs=file, pairs_share=1.0, drop_rate=0.5)))
    (whole,) = {*batch["cl_lengths"][:16].tolist()}
    dropped = batch["cl_lengths"][16:32]
    assert (dropped <= whole).all()
    assert 0.3 * whole < dropped.float().mean() < 0.7 * whole
    assert len(batch["cl_lengths"]) == 48


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"anchor": "a"}, "line 1: expected an object with anchor, and positive or negative"),
        (["a", "b"], "line 1: expected an object"),
        ({"anchor": "a", "positive": " "}, "texts that are not empty"),
        ({"anchor": "a", "positive": "b", "negative": [1]}, "texts that are not empty"),
        ({"anchor": "a", "positive": "b", "negative": 1}, "texts that are not empty"),
    ],
)
def test_bad_pairs_are_refused(row: Any, message: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(GemError, match=message):
        make(pairs=write_pairs(tmp_path, [row])).check()


def test_files_of_pairs_that_cannot_be_read_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(GemError, match=r"give a .jsonl"):
        make(pairs=str(tmp_path / "missing.jsonl")).check()
    with pytest.raises(GemError, match="holds no pair"):
        make(pairs=write_pairs(tmp_path, [])).check()
    few = [{"anchor": "the river", "positive": "a bridge"}] * 15
    with pytest.raises(GemError, match="holds 15 pairs; a batch needs 16"):
        make(pairs=write_pairs(tmp_path, few)).check()
