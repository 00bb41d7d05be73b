"""Runs in prompts, and the special tokens of a step, against what is obvious and slow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gem_vllm.errors import GemError
from gem_vllm.mask import gem_mask
from gem_vllm.plugin.runs import Run, check_runs, find_runs, pad_runs
from tests.plugin.steps import SPECIAL, step_of


def test_special_rows_of_a_mixed_batch() -> None:
    # A decoding request, an embedding request in one chunk, one whose run is half computed.
    text = list(range(17))
    step = step_of(
        {1, 2}, (text, 17, 1), ([*text[:7], *SPECIAL], 0, 10), ([*text, *SPECIAL], 18, 2)
    )
    assert step is not None
    assert step.rows.tolist() == [8, 9, 10, 11, 12]
    assert step.num_read == 5
    assert step.request_index.tolist() == [1, 1, 1, 2, 2]
    assert step.seen_from.tolist() == [0] * 5
    assert step.seen_to.tolist() == [7, 7, 7, 17, 17]
    assert step.special_index.tolist() == [0, 1, 2, 1, 2]
    assert step.needs_mask.tolist() == [False, True, True, True, True]
    assert step.segments is None
    assert step.position_shift is None


def test_a_chunk_before_the_run_has_no_special_rows() -> None:
    assert step_of({0}, ([*range(40), *SPECIAL], 0, 16)) is None
    assert step_of(set(), (list(range(9)), 0, 9)) is None


def test_a_step_with_a_run_inside_a_prompt() -> None:
    """Blocks of 8: text at 0, padding at 5, the run at 8, text at 11; then one that is embedded."""
    inside = pad_runs([*range(5), *SPECIAL, *range(4)], SPECIAL, 8)
    assert inside == [*range(5), *[900] * 3, *SPECIAL, *range(4)]
    step = step_of({1}, (inside, 2, 13), ([1, 2, *SPECIAL], 0, 5), (inside, 40, 1))
    assert step is not None
    assert step.rows.tolist() == [15, 16, 17, 6, 7, 8]
    assert step.num_read == 3
    assert step.request_index.tolist() == [1, 1, 1, 0, 0, 0]
    assert step.seen_to.tolist() == [2, 2, 2, 5, 5, 5]
    assert step.needs_mask.tolist() == [False, True, True, True, True, True]
    assert step.segments is not None
    assert step.segments.request_index.tolist() == [0, 0, 1, 2]
    assert step.segments.num_rows.tolist() == [9, 4, 5, 1]
    assert step.segments.start.tolist() == [0, 8, 0, 8]
    assert step.segments.end.tolist() == [11, 15, 5, 41]
    assert step.position_shift is not None
    assert step.position_shift.tolist() == [0] * 6 + [3] * 7 + [0] * 5 + [3]


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    ends_with_run=st.booleans(),
    k=st.integers(1, 16),
    block=st.sampled_from([16, 32]),
)
def test_padding_leaves_the_mask_as_it_is(
    lengths: list[int], ends_with_run: bool, k: int, block: int
) -> None:
    """What the engine's rows see, padding left out, is what `gem_mask` shows of the prompt."""
    special = tuple(range(1000, 1000 + k))
    prompt: list[int] = []
    for i, length in enumerate(lengths):
        prompt += [*(special if i else ()), *range(length)]
    prompt += special if ends_with_run else ()
    check_runs(prompt, special)
    padded = pad_runs(prompt, special, block)
    runs = find_runs(padded, special)
    assert all(run.start % block == 0 for run in runs)
    padding = {i for run in runs for i in range(run.seen_to, run.start)}
    real = [i for i in range(len(padded)) if i not in padding]
    assert [padded[i] for i in real] == prompt

    seen = torch.zeros(len(padded), len(padded), dtype=torch.bool)
    for i in real:
        start = max((run.start for run in runs if run.end <= i), default=0)
        seen[i, start : i + 1] = True
        for run in runs:
            if run.start <= i < run.end:
                seen[i] = False
                seen[i, run.seen_from : run.seen_to] = seen[i, i] = True
    assert torch.equal(seen[real][:, real], gem_mask(torch.tensor(prompt), special))
    assert not seen[:, sorted(padding)].any()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([5, 900, 6], "position 1 of the prompt are no whole run"),
        ([5, 901, 900, 902], "no whole run"),
        ([5, *SPECIAL, *SPECIAL, 6], "no whole run"),
        ([*SPECIAL, 6], "starts with special tokens"),
    ],
)
def test_what_is_no_run_is_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(GemError, match=message):
        check_runs(prompt, SPECIAL)


BLOCK = 8
TEXT = st.lists(st.integers(0, 99), min_size=1, max_size=20)
# Texts with runs between them; whether a run ends it, as it does a text to be embedded; where the
# step begins and how many tokens it has, as shares of the prompt.
REQUEST = st.tuples(
    st.lists(TEXT, min_size=1, max_size=4), st.booleans(), st.floats(0, 0.9), st.floats(0, 1)
)


@given(st.lists(REQUEST, min_size=1, max_size=6))
def test_a_step_of_any_requests(
    requests: list[tuple[list[list[int]], bool, float, float]],
) -> None:
    """Position by position: which are special tokens, what they see, and how they are ordered."""
    batch, embedding = [], set()
    for i, (texts, embed, begin_at, share) in enumerate(requests):
        ids = with_runs_between(texts)
        if embed:
            ids += SPECIAL
            embedding.add(i)
        begin = int(begin_at * len(ids))
        batch.append((ids, begin, max(1, int(share * (len(ids) - begin)))))
    read: list[tuple[int, ...]] = []
    inside: list[tuple[int, ...]] = []
    shift: list[int] = []
    starts: list[int] = []
    for i, (ids, begin, count) in enumerate(batch):
        runs = slow_runs(ids)
        for position in range(begin, begin + count):
            for run in runs:
                if run.start <= position < run.end:
                    its = (len(shift), i, position - run.start, run.seen_from, run.seen_to)
                    (read if i in embedding and run == runs[-1] else inside).append(its)
            shift.append(sum(run.padding for run in runs if run.start <= position))
            starts.append(max((run.start for run in runs if run.end <= position), default=0))
    step = step_of(embedding, *batch)
    if step is None:
        assert not read + inside
        assert not any(starts)
        return
    assert step.num_read == len(read)
    columns = (
        step.rows,
        step.request_index,
        step.special_index,
        step.seen_from,
        step.seen_to,
    )
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == read + inside
    assert step.rows.dtype == torch.int64
    assert step.rows_np.tolist() == step.rows.tolist()
    if step.position_shift is None:
        assert not any(shift)
    else:
        assert step.position_shift.tolist() == shift
    if step.segments is None:
        assert not any(starts)
    else:
        of_rows = zip(step.segments.start, step.segments.num_rows, strict=True)
        assert [int(start) for start, count in of_rows for _ in range(count)] == starts


def with_runs_between(texts: list[list[int]]) -> list[int]:
    """Texts, a run between one and the next, with padding."""
    ids = [*texts[0], *(each for text in texts[1:] for each in [*SPECIAL, *text])]
    return pad_runs(ids, SPECIAL, BLOCK)


def slow_runs(ids: list[int]) -> list[Run]:
    """Runs end where the last special token is followed by another token, or by nothing."""
    ends = [i + 1 for i, each in enumerate(ids) if each == SPECIAL[-1]]
    runs: list[Run] = []
    for end in ends:
        start = end - len(SPECIAL)
        seen_to = start
        while ids[seen_to - 1] in SPECIAL:
            seen_to -= 1
        runs.append(Run(runs[-1].start if runs else 0, seen_to, start, end))
    return runs


@given(st.lists(TEXT, min_size=1, max_size=4), st.booleans())
def test_runs_are_found(texts: list[list[int]], embed: bool) -> None:
    ids = with_runs_between(texts)
    ids += SPECIAL if embed else ()
    assert list(find_runs(ids, SPECIAL)) == slow_runs(ids)
