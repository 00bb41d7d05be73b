"""What a replica leaves in the output folder, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from gem_vllm.serving.errors import JobError
from gem_vllm.serving.manifest import PLAN, OutputFolder
from gem_vllm.serving.plan import Shard
from gem_vllm.serving.replica import Replica, _Counts
from tests.serving.jobs import errors_of


def test_a_node_that_does_not_share_the_output_says_so(tmp_path: Path) -> None:
    replica = object.__new__(Replica)
    replica._output = OutputFolder(str(tmp_path))
    with pytest.raises(JobError, match="give an --output that all nodes share"):
        replica._check_output()
    replica._output.write_json(PLAN, {})
    replica._check_output()


def test_errors_of_an_attempt_that_was_cut_off_are_removed(tmp_path: Path) -> None:
    replica = object.__new__(Replica)
    replica._output = OutputFolder(str(tmp_path))
    shard = Shard(0, 0, 0, 1)
    replica._write_errors(shard, _Counts(errors=[("in.txt", 0, None, "the text is empty")]))
    assert len(errors_of(str(tmp_path))) == 1
    replica._write_errors(shard, _Counts())
    assert errors_of(str(tmp_path)) == []
