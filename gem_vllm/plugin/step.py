"""Where the special tokens of the current engine step are; shared by runner, attention and LoRA.

A worker process runs one step at a time. The runner publishes the step before it builds the
attention metadata and clears it when the forward pass is over, so a dummy or profiling run
never sees the rows of an earlier step.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from gem_vllm.plugin.runs import Run

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segments:
    """A step's tokens, in their order, parted where a run ends: the rows of each see one start.

    Attributes:
        request_index: int64 [n]: the batch row of the request that each belongs to.
        num_rows: int64 [n]: tokens of this step; they sum up to all of it.
        start: int64 [n]: first position, within its sequence, that its rows see; a KV block's.
        end: int64 [n]: position behind its last row.
    """

    request_index: IntArray
    num_rows: IntArray
    start: IntArray
    end: IntArray


@dataclass(frozen=True)
class GemStep:
    """The special tokens among the tokens of one step, and what is behind a run.

    Those whose hidden states are read, the runs of embedding requests, come first; then those
    inside prompts; each in batch order.

    Attributes:
        rows: int64 [n], on the model's device: row of each special token among the step's tokens.
        rows_np: int64 [n]: the same, for what is planned on the CPU.
        request_index: int64 [n]: the batch row of the request that each belongs to.
        special_index: int64 [n]: which of the k special tokens it is, 0 to k - 1.
        seen_from: int64 [n]: first position, within its sequence, that it sees; a KV block's.
        seen_to: int64 [n]: position behind the last that it sees, but for itself.
        needs_mask: bool [n]: whether a causal kernel would show it more than that.
        num_read: how many of the n are read.
        segments: None where no row is behind a run.
        position_shift: int64 [tokens]: padding before each token of the step; None for none.
    """

    rows: torch.Tensor
    rows_np: IntArray
    request_index: IntArray
    special_index: IntArray
    seen_from: IntArray
    seen_to: IntArray
    needs_mask: npt.NDArray[np.bool_]
    num_read: int
    segments: Segments | None
    position_shift: IntArray | None

    @staticmethod
    def of_batch(
        runs: Mapping[int, tuple[Run, ...]],
        embedding: Set[int],
        num_computed: IntArray,
        num_scheduled: IntArray,
        device: torch.device,
    ) -> GemStep | None:
        """Find the special tokens of a step; None where it has none, and nothing behind a run.

        Args:
            runs: batch row to the runs of its sequence; rows without runs may be left out.
            embedding: batch rows of embedding requests, whose last run is read.
            num_computed: int [requests]: tokens computed before this step.
            num_scheduled: int [requests]: tokens computed in this step.
            device: where `rows` goes.
        """
        if not runs:
            return None
        # Of every run; in what follows, of every special token in the step.
        request, seen_from, seen_to, start, end, is_read = np.array(
            [
                (i, run.seen_from, run.seen_to, run.start, run.end, i in embedding and run is last)
                for i, its_runs in runs.items()
                for last in its_runs[-1:]
                for run in its_runs
            ],
            dtype=np.int64,
        ).T
        begins = num_computed[request]
        ends = begins + num_scheduled[request]
        first = np.maximum(start, begins)
        count = np.maximum(np.minimum(end, ends) - first, 0)
        segments = _segments(runs, num_computed, num_scheduled) if (end < ends).any() else None
        if not count.any() and segments is None:
            return None
        padded = start > seen_to
        read_first = np.argsort(1 - is_read, kind="stable")
        run_of = np.repeat(read_first, count[read_first])
        position = first[run_of] + _counted_up(count[read_first])
        special_index = position - start[run_of]
        first_row = np.cumsum(num_scheduled) - num_scheduled
        rows = first_row[request[run_of]] + position - begins[run_of]
        return GemStep(
            rows=async_tensor_h2d(rows, device),
            rows_np=rows,
            request_index=request[run_of],
            special_index=special_index,
            seen_from=seen_from[run_of],
            seen_to=seen_to[run_of],
            needs_mask=(special_index > 0) | padded[run_of],
            num_read=int(count[is_read == 1].sum()),
            segments=segments,
            position_shift=_position_shift(runs, num_computed, num_scheduled)
            if padded.any()
            else None,
        )


def _counted_up(counts: IntArray) -> IntArray:
    """From 0 to count - 1, for one count after the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _segments(
    runs: Mapping[int, tuple[Run, ...]], num_computed: IntArray, num_scheduled: IntArray
) -> Segments:
    parts: list[tuple[int, int, int, int]] = []
    for i, (computed, scheduled) in enumerate(zip(num_computed, num_scheduled, strict=False)):
        begin, end = int(computed), int(computed + scheduled)
        start = 0
        for run in runs.get(i, ()):
            if run.end >= end:
                break
            if run.end > begin:
                parts.append((i, run.end - begin, start, run.end))
                begin = run.end
            start = run.start
        parts.append((i, end - begin, start, end))
    columns = (np.array(column, dtype=np.int64) for column in zip(*parts, strict=True))
    return Segments(*columns)


def _position_shift(
    runs: Mapping[int, tuple[Run, ...]], num_computed: IntArray, num_scheduled: IntArray
) -> IntArray:
    first_row = np.cumsum(num_scheduled) - num_scheduled
    shift = np.zeros(int(num_scheduled.sum()), dtype=np.int64)
    for i, its_runs in runs.items():
        rows = shift[first_row[i] : first_row[i] + num_scheduled[i]]
        for run in its_runs:
            rows[max(run.start - int(num_computed[i]), 0) :] += run.padding
    return shift


_current: GemStep | None = None


def publish(step: GemStep | None) -> None:
    """Set the step that `current` returns; None ends it."""
    global _current
    _current = step


def current() -> GemStep | None:
    """The step whose forward pass is running; None where no run of special tokens concerns it."""
    return _current
