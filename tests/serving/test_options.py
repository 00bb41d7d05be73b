"""What a job is asked for, as its processes and its next run see it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gem_vllm.errors import GemError
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions
from gem_vllm.serving.processor import EmbedProcessorConfig


def test_local_paths_are_absolute(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = EmbedOptions(model="x", input="a/../in.txt", output="s3://out")  # type: ignore
    asked = (options.model, options.input, options.output)
    assert asked == (tmp_path / "x", f"{tmp_path}/in.txt", "s3://out")
    model = tiny_checkpoint("llama", k=2)
    monkeypatch.chdir(model.parent)
    assert EmbedProcessorConfig(model=model.name).model == model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"tensor_parallel_size": 2}}, "use --tensor-parallel-size"),
        ({"engine": {"data_parallel_size": 2}}, "use --max-replicas"),
        ({"engine": {"pipeline_parallel_size": "2"}}, "pipeline_parallel_size '2'; give 1 or more"),
        ({"cpus": float("nan")}, "--cpus-per-replica is nan"),
    ],
)
def test_what_engines_cannot_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GemError, match=message):
        ReplicaOptions(**changes).check()


def test_what_is_bound_of_the_engine() -> None:
    engine = {"dtype": "float32", "max_num_seqs": 8, "download_dir": Path("x")}
    bound = {"engine dtype": "float32", "engine download_dir": "x"}
    assert ReplicaOptions(engine=engine).decisive() == bound
