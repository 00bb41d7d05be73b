"""Where the special tokens of the current engine step are; shared by runner, attention and LoRA.

A worker process runs one step at a time. The runner publishes the step before it builds the
attention metadata and clears it when the forward pass is over, so a dummy or profiling run
never sees the rows of an earlier step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class GemStep:
    """The special tokens among the tokens of one step, in batch order.

    Attributes:
        rows: int64 [n], on the model's device: row of each special token among the step's tokens.
        request_index: int64 [n]: the batch row of the request that each belongs to.
        run_start: int64 [n]: position, within its sequence, at which the token's run starts.
        special_index: int64 [n]: which of the k special tokens it is, 0 to k - 1.
    """

    rows: torch.Tensor
    request_index: IntArray
    run_start: IntArray
    special_index: IntArray

    @staticmethod
    def of_batch(
        embedding_requests: Sequence[int],
        prompt_lens: IntArray,
        num_computed: IntArray,
        num_scheduled: IntArray,
        k: int,
        device: torch.device,
    ) -> GemStep | None:
        """Find the special tokens of a step; None where it has none.

        Args:
            embedding_requests: batch rows of the embedding requests.
            prompt_lens: int [requests]: prompt lengths, special tokens included.
            num_computed: int [requests]: tokens computed before this step.
            num_scheduled: int [requests]: tokens computed in this step.
            k: special tokens at the end of every embedding request's prompt.
            device: where `rows` goes.
        """
        first_row = np.cumsum(num_scheduled) - num_scheduled
        rows, request_index, run_start, special_index = [], [], [], []
        for i in embedding_requests:
            start = int(prompt_lens[i]) - k
            begin = max(start, int(num_computed[i]))
            end = int(num_computed[i]) + int(num_scheduled[i])
            for position in range(begin, end):
                rows.append(int(first_row[i]) + position - int(num_computed[i]))
                request_index.append(i)
                run_start.append(start)
                special_index.append(position - start)
        if not rows:
            return None
        return GemStep(
            rows=torch.tensor(rows, dtype=torch.int64).to(device, non_blocking=True),
            request_index=np.array(request_index, dtype=np.int64),
            run_start=np.array(run_start, dtype=np.int64),
            special_index=np.array(special_index, dtype=np.int64),
        )


_current: GemStep | None = None


def publish(step: GemStep | None) -> None:
    """Set the step that `current` returns; None ends it."""
    global _current
    _current = step


def current() -> GemStep | None:
    """The step whose forward pass is running, None where it has no special tokens."""
    return _current
