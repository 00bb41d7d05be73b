"""vLLM is told what the machine can do."""

from __future__ import annotations

import socket
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from gem_vllm import compat, machine
from gem_vllm.errors import GemError


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fma avx2", "float32"), ("avx512_bf16 fma", "auto"), ("amx_bf16", "auto")],
)
def test_bfloat16_only_where_the_cpu_computes_it(
    flags: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    assert machine.serve_dtype() == dtype


def test_vllm_gets_every_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 1})
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert machine.serve_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "1,3"
    assert machine.serve_environment(workers=2)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert machine.serve_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0"


def test_vllm_compiles_for_a_cpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    for cuda, told in ((False, "0"), (True, None)):
        monkeypatch.setattr(machine, "has_cuda", lambda cuda=cuda: cuda)
        assert machine.serve_environment().get("VLLM_USE_AOT_COMPILE") == told


def test_one_openmp_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "/a/libtcmalloc.so:/torch.libs/libgomp-a34.so.1 /b/c.so")
    assert machine.serve_environment()["LD_PRELOAD"].endswith("libgomp-a34.so.1 /b/c.so")
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    assert machine.serve_environment()["LD_PRELOAD"] == f"{openmp}:/a/libtcmalloc.so:/b/c.so"


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, True),
        ({"vllm-cpu": "0.32.0"}, True),
        ({"vllm": "0.32.0"}, False),
        ({}, False),
    ],
)
def test_the_build_says_what_vllm_runs_on(
    installed: dict[str, str], cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(compat, "version", version)
    assert machine.is_cpu_build() is cpu


@pytest.mark.parametrize("option", ["model", "no_such_option"])
def test_an_option_that_is_not_the_engines_is_named(option: str) -> None:
    machine.check_engine_options({"max_model_len": 512, "compilation_config": 0})
    with pytest.raises(GemError, match=f"--engine cannot set {option}: "):
        machine.check_engine_options({"max_model_len": 512, option: 1})


@pytest.mark.parametrize("size", [None, 0, "2", 1.5])
def test_workers_are_a_number(size: object) -> None:
    assert machine.engine_workers({"tensor_parallel_size": 2, "pipeline_parallel_size": 3}) == 6
    with pytest.raises(GemError, match="pipeline_parallel_size must be a whole number from 1 on"):
        machine.engine_workers({"pipeline_parallel_size": size})


def test_ports_that_something_listens_on_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = machine.free_ports(2)
    monkeypatch.setattr(machine, "PORTS", [first, second])
    with socket.create_server(("127.0.0.1", first)):
        assert machine.free_ports(1) == [second]
        with pytest.raises(GemError, match="1 are free"):
            machine.free_ports(2)
    assert set(machine.free_ports(2)) == {first, second}
