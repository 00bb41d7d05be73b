"""``vllm serve`` for the length of the demo."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from gem_vllm.errors import GemError
from gem_vllm.machine import free_ports, serve_dtype, serve_environment
from gem_vllm.processes import process_group

SERVED_NAME = "gem"
CONTEXT_TOKENS = 2048
KV_CACHE = "1G"
START_SECONDS = 600.0
LOG_TAIL_LINES = 30


@contextlib.contextmanager
def serve(checkpoint: Path, log: Path, on_wait: Callable[[float], None]) -> Iterator[str]:
    """Serve ``checkpoint``; yield the server's base URL once it answers.

    Args:
        log: file for the server's output.
        on_wait: called about every half second with the seconds waited so far.

    Raises:
        GemError: the server ended, did not answer within `START_SECONDS`, or stopped answering in
            the block; the message closes with the end of its log.
    """
    (port,) = free_ports(1)
    with process_group(serve_command(checkpoint, port), env=serve_environment(), log=log) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(server, url, log, seconds=START_SECONDS, on_wait=on_wait)
        try:
            yield url
        except httpx.TransportError as error:
            raise GemError(f"vllm serve stopped answering: {error!r}\n{_tail(log)}") from error


def serve_command(checkpoint: Path, port: int) -> list[str]:
    """The command line; memory is capped, as a laptop has other things to do."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(checkpoint),
        *("--served-model-name", SERVED_NAME),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", serve_dtype()),
        *("--max-model-len", str(CONTEXT_TOKENS)),
        *("--kv-cache-memory-bytes", KV_CACHE),
        "--enforce-eager",  # compiling takes longer than the demo serves
    ]


def wait_until_healthy(
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    *,
    name: str = "vllm serve",
    path: str = "/health",
    seconds: float = START_SECONDS,
    on_wait: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Return when a server that was started answers 200 on ``path``.

    Args:
        process: ends when the server does.
        url: of the server.
        log: file of the server's output.
        name: for messages.
        path: to ask for.
        seconds: to wait at most.
        on_wait: called about every half second with the seconds waited so far.

    Raises:
        GemError: it ended, or did not answer in time; with the end of its log.
    """
    started = time.monotonic()
    while (waited := time.monotonic() - started) < seconds:
        if (status := process.poll()) is not None:
            raise GemError(f"{name} ended with exit status {status}\n{_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}{path}", timeout=5.0, trust_env=False)
            if answer.status_code == httpx.codes.OK:
                return
        on_wait(waited)
        time.sleep(0.5)
    raise GemError(f"{name} did not answer within {seconds:.0f} seconds\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines[-LOG_TAIL_LINES:])])
