"""What a batch job is bound to, and how its input's rows are divided into shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gem_vllm.serving.columnar import Extent, RowRange
from gem_vllm.serving.inputs import InputFile


@dataclass(frozen=True)
class Shard:
    """Rows of an input file, as `RowRange` has them, which become one output file."""

    index: int
    file: int
    start: int
    stop: int
    from_row: int = 0
    from_byte: int = 0

    @property
    def rows(self) -> RowRange:
        """Of its file."""
        return RowRange(self.start, self.stop, self.from_row, self.from_byte)

    @property
    def name(self) -> str:
        """For the names of its files."""
        return f"{self.index:05d}"


@dataclass(frozen=True)
class Plan:
    """What a job is bound to, and how its rows are divided.

    Attributes:
        bound: "input", "checkpoint" and "options": the job goes on only while these are the same.
        files: that are read.
        shards: of all rows, in order.
    """

    bound: dict[str, Any]
    files: list[InputFile]
    shards: list[Shard]

    @property
    def rows(self) -> int:
        """Rows of the input."""
        return sum(shard.stop - shard.start for shard in self.shards)


def make_plan(
    bound: dict[str, Any],
    files: Sequence[InputFile],
    extents: Sequence[Extent],
    rows_per_shard: int,
) -> Plan:
    """Divide files into shards of ``rows_per_shard`` at most."""
    shards: list[Shard] = []
    for i, extent in enumerate(extents):
        for start in range(0, extent.rows, rows_per_shard):
            stop = min(start + rows_per_shard, extent.rows)
            mark = min(start // extent.mark_rows, len(extent.marks))
            begin = (mark * extent.mark_rows, extent.marks[mark - 1]) if mark else (0, 0)
            shards.append(Shard(len(shards), i, start, stop, *begin))
    return Plan(bound, list(files), shards)


def fingerprint(files: Sequence[InputFile]) -> str:
    """Of the input: every file's name, size and time of modification (or ETag)."""
    text = json.dumps([asdict(file) for file in files])
    return hashlib.sha256(text.encode()).hexdigest()


def going_on(had: dict[str, Any], has: dict[str, Any]) -> dict[str, Any]:
    """``had``, with what may change from one run to the next as in ``has``."""
    options, now = had["options"], has["options"]
    # Shards that were finished under "fail" have no bad row: under the others they are the same.
    if options.get("on_error") == "fail" and now.get("on_error") in ("skip", "null"):
        options = {**options, "on_error": now["on_error"]}
    return {**had, "options": options}


def differences(had: Any, has: Any, name: str = "") -> Iterator[str]:
    """In words, what a job was bound to and another is not."""
    if isinstance(had, dict) and isinstance(has, dict):
        for key in [*had, *(key for key in has if key not in had)]:
            yield from differences(had.get(key), has.get(key), key)
    elif had != has:
        shown = f"{name} was {had!r}, is {has!r}" if name != "input" else "the input files changed"
        yield shown if name != "checkpoint" else "the checkpoint is another"
