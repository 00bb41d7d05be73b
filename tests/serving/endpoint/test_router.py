"""Which replica gets a request, by a tree and queue lengths that are given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from gem_vllm.serving.endpoint.messages import ForwardedRequest
from gem_vllm.serving.endpoint.router import ROUTER_OPTIONS, GemRouter

DEPLOYMENT = DeploymentID("GemServer", "gem")
# Older than that, Ray's cache does not know a length any more.
KNOWN_SECONDS = 10.0


@dataclass
class Replica:
    replica_id: ReplicaID
    max_ongoing_requests: int = 256


class Tree:
    """Ray's prefix tree, in which the first replica has all texts."""

    def __init__(self, owner: Replica) -> None:
        self._owner = owner.replica_id.to_full_id_str()
        self.prefix_match = SimpleNamespace(remote=self._match)

    async def _match(self, text: str, names: list[str]) -> tuple[str, list[str]]:
        return text, [self._owner]


def chosen(queues: list[int | None], *, most: int = 256) -> list[int]:
    """The replicas, by number, that the router names for a text that the first one has.

    Args:
        queues: length of each replica's queue, None where Ray has forgotten it.
        most: requests that a replica works on.
    """
    now = 0.0
    replicas = [Replica(ReplicaID(str(n), DEPLOYMENT), most) for n in range(len(queues))]
    router: Any = GemRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        use_replica_queue_len_cache=True,
        get_curr_time_s=lambda: now,
    )
    router.initialize_state(**ROUTER_OPTIONS, tree_actor=Tree(replicas[0]))
    for replica in replicas:
        router.replica_queue_len_cache.update(replica.replica_id, 0)
    now = KNOWN_SECONDS + 1
    for replica, length in zip(replicas, queues, strict=True):
        if length is not None:
            router.replica_queue_len_cache.update(replica.replica_id, length)
    request = ForwardedRequest("POST", "/v1/completions", b"", [], b"", "a" * 300, False)
    matched = router._prefix_match_best_replicas(SimpleNamespace(args=[request]), replicas)
    (named,) = asyncio.run(matched)
    return [replicas.index(replica) for replica in named]


@pytest.mark.parametrize("queues", [[0, 0], [8, 0], [8, None], [None, None], [None, 8]])
def test_a_text_goes_where_its_beginning_is(queues: list[int | None]) -> None:
    assert chosen(queues) == [0]


@pytest.mark.parametrize("queues", [[9, 0], [256, None], [9, None], [None, 9]])
def test_load_decides_where_one_has_much_more_to_do(queues: list[int | None]) -> None:
    """One of which nothing has been heard for long has nothing to do."""
    assert chosen(queues) == []


@pytest.mark.parametrize("queues", [[4, 0], [4, None], [5, 4]])
def test_load_decides_where_the_replica_is_full(queues: list[int | None]) -> None:
    assert chosen(queues, most=4) == []
