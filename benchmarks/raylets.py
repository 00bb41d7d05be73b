"""A Ray cluster of several raylets on this machine, of which one can be killed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from gem_vllm.machine import environment

REPLICA = "MapWorker"


class Raylets:
    """A head without cores, which drivers are on, and nodes of one core each.

    Args:
        nodes: with a core each.
    """

    def __init__(self, nodes: int) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self._nodes: list[Any] = []
        for _ in range(nodes):
            self.add_node(wait=False)
        self._cluster.wait_for_nodes()

    @property
    def address(self) -> str:
        """As `--ray-address` takes it."""
        return str(self._cluster.address)

    @property
    def nodes(self) -> int:
        """Nodes that live, without the head."""
        return len(self._nodes)

    def add_node(self, wait: bool = True) -> None:
        """One more, with one core; without ``wait``, soon."""
        self._nodes.append(self._cluster.add_node(num_cpus=1, wait=wait))

    def kill_node(self, index: int) -> None:
        """kill -9 of a node's raylet, its agents and all its workers."""
        node = self._nodes.pop(index)
        kill(processes_of(node))
        self._cluster.remove_node(node, allow_graceful=False)

    def replicas(self) -> list[psutil.Process]:
        """The processes that have an engine, on all nodes."""
        processes = [process for node in self._nodes for process in processes_of(node)]
        return [process for process in processes if is_replica(process)]

    def shutdown(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()


@contextlib.contextmanager
def raylets(nodes: int) -> Iterator[Raylets]:
    """`Raylets` that end with the block; no other Ray of this machine sees them."""
    with (
        # Of a short name: Ray's sockets are in there.
        tempfile.TemporaryDirectory(
            prefix="raylets-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,
        environment({"RAY_TMPDIR": folder}),
    ):
        cluster = Raylets(nodes)
        try:
            yield cluster
        finally:
            cluster.shutdown()


def processes_of(node: Any) -> list[psutil.Process]:
    """All processes of a node: what it was started as, and their children."""
    found: list[psutil.Process] = []
    for infos in node.all_processes.values():
        for info in infos:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(info.process.pid)
                found += [process, *process.children(recursive=True)]
    return found


def is_replica(process: psutil.Process) -> bool:
    """Whether this is an actor with an engine; Ray names it after what it does."""
    try:
        return REPLICA in " ".join(process.cmdline()[:1])
    except psutil.NoSuchProcess:  # gone, or a zombie
        return False


def kill(processes: Iterable[psutil.Process]) -> None:
    """kill -9 of all that still live."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
