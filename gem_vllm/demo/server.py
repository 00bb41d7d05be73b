"""``vllm serve`` for the length of the demo."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

from gem_vllm.demo.processes import process_group
from gem_vllm.errors import GemError
from gem_vllm.machine import serve_dtype, serve_environment

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
    port = _free_port()
    with process_group(serve_command(checkpoint, port), env=serve_environment(), log=log) as server:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(server, url, log, on_wait)
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
    server: subprocess.Popen[bytes], url: str, log: Path, on_wait: Callable[[float], None]
) -> None:
    """Return when ``url``/health answers 200; raise GemError as `serve` says."""
    started = time.monotonic()
    while (waited := time.monotonic() - started) < START_SECONDS:
        if (status := server.poll()) is not None:
            raise GemError(f"vllm serve ended with exit status {status}\n{_tail(log)}")
        with contextlib.suppress(httpx.TransportError):
            if (
                httpx.get(f"{url}/health", timeout=2.0, trust_env=False).status_code
                == httpx.codes.OK
            ):
                return
        on_wait(waited)
        time.sleep(0.5)
    raise GemError(f"vllm serve did not answer within {START_SECONDS:.0f} seconds\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([f"the end of {log}:", *(f"  {line}" for line in lines[-LOG_TAIL_LINES:])])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
