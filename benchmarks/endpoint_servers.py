"""The servers of `endpoint.py`: started, and stopped while it is not their turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from gem_vllm.demo.server import wait_until_healthy
from gem_vllm.machine import free_ports, serve_dtype, serve_environment
from gem_vllm.processes import process_group

MODEL = "gem"
STOP_SECONDS = 60.0
IDLE_SECONDS = 5.0
# What was due while a server was stopped it does at once: Ray's and Serve's looks at each other.
WAKE_SECONDS = 2.0


class Server:
    """A running server, which uses no core while it is `parked`.

    Args:
        name: for messages.
        url: of its HTTP server.
        process: that was started; the others of the server are below it.
    """

    def __init__(self, name: str, url: str, process: subprocess.Popen[bytes]) -> None:
        self.name, self.url = name, url
        self._process = psutil.Process(process.pid)

    def park(self) -> None:
        """Stop all its processes where they are (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Let its processes go on."""
        self._signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Of all its processes that live."""
        total = 0.0
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]


@contextlib.contextmanager
def awake(servers: Sequence[Server]) -> Iterator[None]:
    """Let parked servers go on for the length of the block."""
    for server in servers:
        server.wake()
    try:
        time.sleep(WAKE_SECONDS)
        yield
    finally:
        for server in servers:
            server.park()


def busy_seconds() -> float:
    """CPU time that this machine has given, to whomever; other machines' share of it included."""
    times = psutil.cpu_times()._asdict()
    # A guest's time is in the user's too.
    idle = sum(times.get(name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return float(sum(times.values()) - idle)


def idle_cores(servers: Sequence[Server]) -> float:
    """Cores that servers use together while they have nothing to do."""
    with awake(servers):
        before = sum(server.cpu_seconds() for server in servers)
        time.sleep(IDLE_SECONDS)
        return (sum(server.cpu_seconds() for server in servers) - before) / IDLE_SECONDS


@contextlib.contextmanager
def vllm_serve(
    checkpoint: Path,
    options: Mapping[str, Any],
    log: Path,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`vllm serve` on all cores, parked once it answers.

    Args:
        checkpoint: to serve as `MODEL`.
        options: of the engine (`EngineArgs`).
        log: file for its output.
        environment: beside this process's.
    """
    command = ["vllm", "serve", str(checkpoint), *flags({**options, "dtype": serve_dtype()})]
    env = {**serve_environment(), **(environment or {})}
    with _started("vllm serve", command, env, log) as server:
        yield server


@contextlib.contextmanager
def gem_vllm_serve(
    checkpoint: Path, options: Mapping[str, Any], log: Path, arguments: Sequence[str] = ()
) -> Iterator[Server]:
    """`gem-vllm serve` with a Ray of its own, parked once it answers; else as `vllm_serve`.

    Args:
        arguments: further ones of the command line.
    """
    command = ["gem-vllm", "serve", str(checkpoint), "--engine", json.dumps(dict(options))]
    # Of a short name: Ray's sockets are in there.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        # What a replica needs of `serve_environment` it gets by itself.
        env = {**os.environ, "RAY_TMPDIR": folder}
        with _started("gem-vllm serve", [*command, *arguments], env, log) as server:
            yield server


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of vLLM's engine as its command line has them."""
    found: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", str(value)]
    return found


@contextlib.contextmanager
def _started(
    name: str, command: Sequence[str], env: Mapping[str, str], log: Path
) -> Iterator[Server]:
    (port,) = free_ports(1)
    program = Path(sys.executable).with_name(command[0])
    arguments = ("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL)
    with process_group([program, *command[1:], *arguments], env=env, log=log) as process:
        server = Server(name, f"http://127.0.0.1:{port}", process)
        try:
            wait_until_healthy(process, server.url, log, name=name, path="/v1/models")
            server.park()
            yield server
        finally:
            server.wake()
            # By itself first, in its own order; what is left then ends with the group.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
