"""Short rows packed into fewer long ones, so that no time goes into padding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

# Cells of a row of which attention under a dense mask takes as long as all else, on a CPU, in a
# model of 135 million parameters; more in a larger one, where there is less to choose.
ATTENTION_EQUALS = 1500
# Widths of rows that are tried, in eighths of the longest text.
WIDTHS = range(8, 33)


@dataclass(frozen=True)
class Packing:
    """Where each of N rows lies among B rows of L cells, several to a row, none over a border.

    Attributes:
        row: int64 [N], which of the B.
        offset: int64 [N], its first cell there.
        lengths: int64 [N].
        shape: (B, L).
    """

    row: torch.Tensor
    offset: torch.Tensor
    lengths: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, lengths: torch.Tensor, width: int, multiple_of: int = 1) -> Packing:
        """Longest first, each into the first row that has room (first-fit decreasing).

        lengths: int64 [N]; width: cells of a row, as many as the longest at least; L, and width
        with it, are rounded up to a multiple of ``multiple_of``.
        """

        def rounded(cells: int) -> int:
            return -(-cells // multiple_of) * multiple_of

        width = rounded(width)
        sizes: list[int] = lengths.tolist()
        used: list[int] = []
        row, offset = [0] * len(sizes), [0] * len(sizes)
        for index, length in sorted(enumerate(sizes), key=lambda item: -item[1]):
            place = next((i for i, cells in enumerate(used) if cells + length <= width), len(used))
            if place == len(used):
                used.append(0)
            row[index], offset[index] = place, used[place]
            used[place] += length
        rows = torch.tensor(row, device=lengths.device)
        offsets = torch.tensor(offset, device=lengths.device)
        return cls(rows, offsets, lengths, (len(used), rounded(max(used))))

    @classmethod
    def for_dense_masks(cls, lengths: torch.Tensor) -> Packing:
        """The cheapest of some, where a row's attention costs its length squared, seen or not.

        Wide rows are filled better and are masked to a larger part. B * L is one of eight numbers
        between powers of two, so that a step's tensors fit where another step's were; some rows may
        be empty. (With sizes that are new in every step, glibc's malloc comes to take much of
        the time: it searches one list of all free blocks of more than half a megabyte.)

        lengths: int64 [N].
        """
        longest = int(lengths.max())
        unit = 2 ** max(round(math.log2(longest / 8)), 0)
        widths = sorted({-(-longest * each // (8 * unit)) * unit for each in WIDTHS})
        found = (cls.of(lengths, each, multiple_of=unit) for each in widths)
        return min((each._of_a_usual_size() for each in found), key=cls._cost)

    def _cost(self) -> int:
        rows, cells = self.shape
        return rows * cells * (ATTENTION_EQUALS + cells)

    def _of_a_usual_size(self) -> Packing:
        rows, cells = self.shape
        unit = max(2 ** (math.floor(math.log2(rows * cells)) - 3), 1)
        step = unit // math.gcd(unit, cells)
        return replace(self, shape=(-(-rows // step) * step, cells))

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """[N, T] to [B, L]; cells that hold nothing are 0."""
        packed = values.new_zeros(self.shape)
        real, cells = self._cells(values.shape[1])
        packed.view(-1)[cells[real]] = values[real]
        return packed

    def unpack(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        """[B, L, ...] to [N, width, ...], with gradients; 0 behind each row."""
        real, cells = self._cells(width)
        rows = packed.new_zeros(*real.shape, *packed.shape[2:])
        return rows.index_put((real,), packed.flatten(0, 1)[cells[real]])

    def _cells(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Bool [N, width], what is not padding, and int64 [N, width], where it lies in [B * L]."""
        position = torch.arange(width, device=self.lengths.device)
        start = self.row * self.shape[1] + self.offset
        return position < self.lengths[:, None], start[:, None] + position
