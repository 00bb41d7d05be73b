"""An endpoint from this process: started, watched, drained and stopped (`gem-vllm serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.context import _get_global_client
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException

from gem_vllm.errors import GemError
from gem_vllm.serving.endpoint.application import build
from gem_vllm.serving.endpoint.options import APP_NAME, EndpointOptions
from gem_vllm.serving.errors import JobError, told_by_validation
from gem_vllm.serving.pool import ray_cluster

WATCH_SECONDS = 5.0
DRAIN_POLL_SECONDS = 0.5
CALL_SECONDS = 30.0

Report = Callable[[str], None]


def run_endpoint(
    options: EndpointOptions, host: str, port: int, ray_address: str | None, report: Report
) -> None:
    """Serve until SIGTERM or SIGINT, then answer what was taken, and stop.

    Args:
        options: checked here.
        host, port: of the HTTP proxies.
        ray_address: of a running cluster, which stays; None for one on this machine, for this
            process, to be set up by `own_ray_settings`.
        report: called with a line whenever there is something to say.

    Raises:
        GemError: the endpoint cannot be begun; nothing was started.
        JobError: it was begun and could not be brought up.
    """
    with _quiet_logs():
        options.check()
    if ray_address is None:
        _check_port(host, port)
    stop = _Stop()
    with stop.on_signals(), _quiet_logs(), ray_cluster(options.replicas(ray_address)):
        if ray_address is not None:
            if RAY_SERVE_ENABLE_HA_PROXY:  # which asks replicas by their nodes' addresses
                _check_host(host)
            _check_serve(host, port)
        if options.max_replicas > 1 and not RAY_SERVE_ENABLE_HA_PROXY:
            report(
                "RAY_SERVE_ENABLE_HA_PROXY is not 1 here: requests go to replicas by load alone, "
                "not by what is in their prefix caches"
            )
        try:
            report(f"starting {options.min_replicas} replica(s) of {options.model_name}")
            _start(options, host, port)
            report(f"serving {options.model_name} on http://{host}:{port}/v1 (Ctrl-C stops it)")
            _watch(stop, report)
            report("answering what was taken; no new requests (Ctrl-C again drops them)")
            asyncio.run(_drain(options.request_timeout_s, report))
        finally:
            if ray_address is not None:
                with contextlib.suppress(RayServeException):
                    serve.delete(APP_NAME)
    report("stopped")


def _check_port(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise GemError(f"--host {host} --port {port} cannot be used: {error}") from error


def _check_host(host: str) -> None:
    """GemError where proxies and replicas of a cluster would listen to their own nodes alone."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) > 1 and (host == "localhost" or host.startswith("127.") or host == "::1"):
        raise GemError(
            f"--host {host} is each node's own, and the cluster has {len(nodes)}; give --host "
            "0.0.0.0, and keep others out by --api-keys or the network"
        )


def _check_serve(host: str, port: int) -> None:
    """GemError where Serve runs already, with this application or at another address."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    if APP_NAME in serve.status().applications:
        raise GemError(
            f"the cluster has an application '{APP_NAME}' already; change it with 'serve deploy', "
            "or stop it first"
        )
    there = client.http_config
    if (there.host, there.port) != (host, port):
        raise GemError(
            f"the cluster's Serve listens on {there.host}:{there.port} already; give --host "
            f"{there.host} --port {there.port}"
        )


class _Stop:
    """What SIGTERM and SIGINT do: interrupt, or, while `orderly`, ask once for an orderly stop."""

    def __init__(self) -> None:
        self.orderly = False
        self.asked = threading.Event()

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if not self.orderly or self.asked.is_set():
            raise KeyboardInterrupt
        self.asked.set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._signalled) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """No logs of Ray and vLLM from this process, which has no engine; `report` says what counts."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _start(options: EndpointOptions, host: str, port: int) -> None:
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        serve.run(build(options), name=APP_NAME, route_prefix="/")
    except (RuntimeError, ValueError, TimeoutError, RayServeException, RayError) as error:
        told = "\n".join([str(error), *_told_by_deployments()])
        raise JobError(f"the endpoint could not be brought up: {reason(told)}") from error


def _told_by_deployments() -> list[str]:
    """What Serve says of each deployment; nothing where it has none, or is gone itself."""
    with contextlib.suppress(RayServeException, RayError):
        application = serve.status().applications.get(APP_NAME)
        if application is not None:
            return [deployment.message for deployment in application.deployments.values()]
    return []


def reason(text: str) -> str:
    """The line of Serve's account of a failed start that says why."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return told_by_validation(lines) or (named or lines or ["no reason was given"])[-1]


def _watch(stop: _Stop, report: Report) -> None:
    """Report every change of the application's state until it is to stop."""
    stop.orderly = True
    seen = ""
    while not stop.asked.wait(WATCH_SECONDS):
        application = serve.status().applications.get(APP_NAME)
        if application is None:
            raise JobError("the application was deleted by somebody else")
        running = {
            name.partition(":")[0]: states.replica_states.get("RUNNING", 0)
            for name, states in application.deployments.items()
        }
        line = ", ".join(f"{count} {name}" for name, count in sorted(running.items()))
        line = f"{application.status.value.lower()}: {line}"
        if line != seen:
            report(line)
            seen = line


async def _drain(timeout_s: float, report: Report) -> None:
    """Close the door of every replica, then wait until they have answered what they took."""
    replicas = serve.get_app_handle(APP_NAME)

    async def of_all(method: str) -> list[Any] | None:
        """What each replica says; None where one of them says nothing in time."""
        try:
            results = await replicas.broadcast(method).results_async(
                timeout_s=CALL_SECONDS, return_exceptions=True
            )
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            return None
        # One that has died has no open requests any more.
        return [result for result in results if not isinstance(result, BaseException)]

    deadline = time.monotonic() + timeout_s
    idle = 0
    # Twice in a row: an answer that has left the replica is still on its way through the proxy.
    while idle < 2 and time.monotonic() < deadline:
        await of_all("drain")  # Each time: a replica that was just starting comes late.
        await asyncio.sleep(DRAIN_POLL_SECONDS)
        still_open = await of_all("open_requests")
        # While one is silent, what the others have taken is waited for to the end.
        idle = idle + 1 if still_open is not None and sum(still_open) == 0 else 0
    if idle < 2:
        report(f"not all requests were answered within {timeout_s:g} s; they are dropped")
