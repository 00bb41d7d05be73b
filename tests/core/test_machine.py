"""vLLM is told what the machine can do."""

from __future__ import annotations

from pathlib import Path

import pytest

from gem_vllm import machine


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
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    assert machine.serve_environment()["VLLM_CPU_OMP_THREADS_BIND"] == "0"


def test_one_openmp_is_preloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "has_cuda", lambda: False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "/a/libtcmalloc.so:/torch.libs/libgomp-a34.so.1 /b/c.so")
    assert machine.serve_environment()["LD_PRELOAD"].endswith("libgomp-a34.so.1 /b/c.so")
    openmp = tmp_path / "lib" / "libiomp5.so"
    openmp.parent.mkdir()
    openmp.touch()
    assert machine.serve_environment()["LD_PRELOAD"] == f"{openmp}:/a/libtcmalloc.so:/b/c.so"


@pytest.mark.parametrize(("version", "cpu"), [("0.32.0+cpu", True), ("0.32.0", False)])
def test_the_build_says_what_vllm_runs_on(
    version: str, cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "version", lambda name: version)
    assert machine.is_cpu_build() is cpu
