"""What a replica leaves in the output folder, without an engine."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from gem_vllm.serving import replica as module
from gem_vllm.serving.errors import JobError
from gem_vllm.serving.manifest import PLAN, OutputFolder
from gem_vllm.serving.plan import Shard
from gem_vllm.serving.replica import Replica, _Counts
from tests.serving.jobs import errors_of


def test_a_node_that_has_not_what_the_drivers_has_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = object.__new__(Replica)
    replica._output = OutputFolder(str(tmp_path))
    replica._options = Mock(model=tmp_path / "model")
    replica._cpu_build = True
    monkeypatch.setattr(module, "is_cpu_build", lambda: False)
    with pytest.raises(JobError, match="give an --output that all nodes share"):
        replica._check_node()
    replica._output.write_json(PLAN, {})
    with pytest.raises(JobError, match=r"has no .*model; give a --model that all have"):
        replica._check_node()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(JobError, match=r"has the CUDA build .* where the job was begun is the CPU"):
        replica._check_node()
    replica._cpu_build = False
    replica._check_node()


def test_errors_of_an_attempt_that_was_cut_off_are_removed(tmp_path: Path) -> None:
    replica = object.__new__(Replica)
    replica._output = OutputFolder(str(tmp_path))
    shard = Shard(0, 0, 0, 1)
    replica._write_errors(shard, _Counts(errors=[("in.txt", 0, None, "the text is empty")]))
    assert len(errors_of(str(tmp_path))) == 1
    replica._write_errors(shard, _Counts())
    assert errors_of(str(tmp_path)) == []
