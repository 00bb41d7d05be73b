"""How a Ray of an endpoint's own is set up: read when Ray is imported, so to be set before that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gem_vllm.machine import environment, free_ports

# So long HAProxy keeps a connection on which nothing is sent (Ray's default).
MAX_TIMEOUT_S = 3600
# Unless the environment has others: HAProxy in front of the replicas, which are HTTP servers
# themselves, instead of Ray's own proxy. A request whose replica goes before it has answered is
# sent to another one: what it asks for is computed, and changes nothing. The beginning of a
# request goes to the router, to find its text in a prefix cache; it has half a minute to arrive.
# Where replicas come or go HAProxy starts anew beside itself; what it had taken before has an
# hour to be answered, as any request has. There is no hand-over between threads and loops in the
# processes of Serve; a replica that stops is left for two seconds before it takes no more
# requests; the controller looks around once a second and not ten times; and the engines are not
# last in the queue for the cores.
RAY_SETTINGS = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(MAX_TIMEOUT_S),
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(1 << 20),
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_TIMEOUT_S": "30",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "2147483647",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_worker_niceness": "0",
}
# Of HAProxy, which has fixed ones unless it is told others: two endpoints of one machine.
PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}


@contextmanager
def own_ray_settings() -> Iterator[None]:
    """The environment of a Ray that this process is going to start, and HAProxy's folder in it.

    Raises:
        GemError: no port is free for HAProxy.
    """
    with tempfile.TemporaryDirectory(prefix="gem-haproxy-", ignore_cleanup_errors=True) as folder:
        files = {name: str(Path(folder, file)) for name, file in FILES.items()}
        ports = dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True))
        settings = {**RAY_SETTINGS, **files, **ports}
        with environment({name: settings[name] for name in settings.keys() - os.environ.keys()}):
            yield
