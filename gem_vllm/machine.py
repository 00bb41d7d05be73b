"""The machine at hand: what vLLM needs to be told about it, and what of it is free."""

from __future__ import annotations

import contextlib
import errno
import inspect
import math
import os
import platform
import random
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gem_vllm.compat import installed_vllm
from gem_vllm.errors import GemError

CPUINFO = Path("/proc/cpuinfo")
CPU_CACHE_BYTES = 2 << 30
_OPENMP = ("libgomp", "libomp", "libiomp")
# By itself the system gives out ports from 32768 on, Ray 10002 to 19999, Kubernetes 30000 and on.
PORTS = range(20_000, 30_000)


def serve_dtype() -> str:
    """float32 on a CPU that has no bfloat16 arithmetic, which vLLM would emulate there."""
    return "auto" if has_cuda() or _cpu_has_bfloat16() else "float32"


def serve_environment(workers: int = 1) -> dict[str, str]:
    """This process's environment, and what makes vLLM use a small CPU well.

    Args:
        workers: processes of the engine that compute: its tensor times its pipeline parallel size.
    """
    env = dict(os.environ)
    if has_cuda() or sys.platform != "linux":
        return env
    # By default vLLM keeps one core for its scheduler: half of a two-core machine.
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    # One list is one worker's; several share the cores as the system sees fit.
    env.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores if workers == 1 else "nobind")
    # vLLM cannot load again what it has compiled ahead of time for a CPU ("no attribute
    # 'finalize_loading'", as of 0.32), and compiles anew at every start; torch's own cache it can.
    env.setdefault("VLLM_USE_AOT_COMPILE", "0")
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        # In its place: vLLM refuses two, and puts torch's into the environment of a process that
        # has had an engine, for the processes that it starts.
        others = (
            library
            for library in env.get("LD_PRELOAD", "").replace(" ", ":").split(":")
            if library and not Path(library).name.startswith(_OPENMP)
        )
        env["LD_PRELOAD"] = ":".join((str(openmp), *others))
    return env


@contextlib.contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Variables for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def engine_defaults(max_model_len: int) -> dict[str, Any]:
    """Options of an engine beside other work; ``max_model_len`` is in tokens."""
    options: dict[str, Any] = {"dtype": serve_dtype(), "max_model_len": max_model_len}
    if is_cpu_build():
        # Plain vLLM would want nearly all of the machine's memory.
        options["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    return options


def engine_workers(options: Mapping[str, Any]) -> int:
    """Processes that compute, of an engine with these options; GemError for no number of them."""
    sizes = {
        name: options.get(name, 1) for name in ("tensor_parallel_size", "pipeline_parallel_size")
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise GemError(f"{name} must be a whole number from 1 on, not {size!r}")
    return math.prod(sizes.values())


def check_engine_options(options: Mapping[str, Any], *, served: bool = False) -> None:
    """Raise GemError for what ``--engine`` cannot set, which an engine would refuse after minutes.

    Args:
        options: by name.
        served: of `vllm serve`; else of a `vllm.LLM`.
    """
    if not options:
        return  # importing vLLM takes seconds
    if served:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import FrontendArgs

        known = {field.name for args in (AsyncEngineArgs, FrontendArgs) for field in fields(args)}
    else:
        from vllm import LLM, EngineArgs

        known = {*inspect.signature(LLM).parameters, *(field.name for field in fields(EngineArgs))}
        known -= {"model", "kwargs"}
    if unknown := sorted(options.keys() - known):
        raise GemError(
            f"--engine cannot set {', '.join(unknown)}: that is no option of vLLM's engine, or "
            "has one of its own here"
        )


def cpu_name() -> str:
    """The processor's model name, and its widest vector units that matter here."""
    if not CPUINFO.is_file():
        return platform.processor() or platform.machine()
    text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    flags = set(text.split())
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    unit = next((flag for flag in known if flag in flags), "no AVX2")
    return f"{names[0] if names else platform.machine()} ({unit})"


def is_cpu_build() -> bool:
    """Whether the vLLM that is installed runs on CPUs, whatever this machine has."""
    return (installed_vllm() or "").endswith("+cpu")


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _cpu_has_bfloat16() -> bool:
    if not CPUINFO.is_file():
        return False
    flags = CPUINFO.read_text(encoding="utf-8", errors="replace").split()
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, for what listens a while later: of those given to nobody else.

    Raises:
        GemError: there are not so many.
    """
    found: list[int] = []
    with contextlib.ExitStack() as sockets:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            try:
                sockets.enter_context(socket.create_server(("", port)))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                found.append(port)
            if len(found) == count:
                return found
    raise GemError(f"of the ports from {PORTS[0]} to {PORTS[-1]}, {len(found)} are free")
