"""Which replica gets a request: one that has its beginning in the prefix cache, if it has room.

Ray's router keeps a tree of the texts that each replica was sent. Here it gets the text of requests
of either task, so that embedding a document and asking about it meet in one cache.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.exceptions import RayActorError, RayError

# Not from `ray.serve.llm.request_router`, which would have every router import vLLM and torch.
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,
)
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTreeActor
from ray.serve._private.constants import SERVE_NAMESPACE

logger = logging.getLogger(__name__)

# Of running and queued requests, from which on load decides and not the cache.
IMBALANCE = 8
# For so long a replica's number of requests is what it said, and what it was chosen for since.
LOAD_SECONDS = 0.1
ANSWER_SECONDS = 5.0
# As Ray's router names it.
TREE_NAME = "LlmPrefixTreeActor"


class PrefixRouting(PrefixCacheAffinityRouter):
    """`request_router_class` of an endpoint's replicas.

    A request goes from the proxy to the replica that is chosen, and none of it is seen here. So
    replicas are asked how many they have, ten times a second at most.
    """

    def initialize_state(self, *, max_ongoing_requests: int, **options: Any) -> None:
        """Find the tree of this deployment, or make it.

        Args:
            max_ongoing_requests: that a replica works on; more wait there.
            options: of Ray's router.
        """
        self._most = max_ongoing_requests
        self._options = options
        self._told: dict[Any, int] = {}
        self._chosen_since: Counter[Any] = Counter()
        self._asked_at = -math.inf
        self._asking: dict[Any, asyncio.Task[None]] = {}
        self._plant()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """The replica that has most of a text, unless it is full or has much more to do.

        The one with the least to do for other requests, and where none has the text. Instead of
        Ray's, which waits for the tree in a way that stops everything else.
        """
        self._ask_for_loads(candidate_replicas)
        loads = [self._load(replica) for replica in candidate_replicas]
        least = min(loads)
        text = _text_of(pending_request) if len(candidate_replicas) > 1 else None
        best = await self._with_beginning_of(text, candidate_replicas) if text is not None else []
        limit = min(least + IMBALANCE, self._most - 1)
        free = [index for index in best if loads[index] <= limit]
        idle = [index for index, load in enumerate(loads) if load == least]
        chosen = candidate_replicas[random.choice(free or idle)]
        self._chosen_since[chosen.replica_id] += 1
        if text is not None:
            self._tree_actor.insert.remote(text, chosen.replica_id.to_full_id_str(), time.time())
        return [[chosen]]

    async def _with_beginning_of(self, text: str, replicas: Sequence[Any]) -> list[int]:
        """Which replicas have most of a text, or, where none has much, the least text at all."""
        numbers = {replica.replica_id.to_full_id_str(): n for n, replica in enumerate(replicas)}
        try:
            matched, names = await self._tree_actor.prefix_match.remote(text, list(numbers))
            if len(matched) < self._match_rate_threshold * len(text):
                names = await self._tree_actor.get_smallest_tenants.remote()
        except RayActorError:
            self._plant_again()
            return []
        # The tree may know a replica longer than it lives.
        return [numbers[name] for name in names or () if name in numbers]

    def _load(self, replica: Any) -> int:
        """Requests of a replica; one that has not said yet has none but those it was chosen for."""
        return self._told.get(replica.replica_id, 0) + self._chosen_since[replica.replica_id]

    def _ask_for_loads(self, replicas: Sequence[Any]) -> None:
        now = time.monotonic()
        if now - self._asked_at < LOAD_SECONDS:
            return
        self._asked_at = now
        there = {replica.replica_id: replica for replica in replicas}
        for counts in (self._told, self._chosen_since):
            for name in counts.keys() - there.keys():
                del counts[name]
        self._asking = {name: task for name, task in self._asking.items() if not task.done()}
        for name in there.keys() - self._asking.keys():
            self._asking[name] = asyncio.create_task(self._hear_load(there[name]))

    async def _hear_load(self, replica: Any) -> None:
        """Ask one replica; one that is slow to answer holds up nothing but what is known of it."""
        name = replica.replica_id
        before = self._chosen_since[name]
        try:
            # Ray's own deadline is without effect.
            async with asyncio.timeout(ANSWER_SECONDS):
                told = await replica.get_queue_len(deadline_s=ANSWER_SECONDS)
        except (TimeoutError, RayError) as error:
            logger.warning("%s does not say how busy it is: %r", name, error)
            told = self._told.get(name, 0) + before
        self._told[name] = told
        self._chosen_since[name] -= before

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Nothing: the tree got the text when the replica was chosen."""

    def update_replicas(self, replicas: list[Any]) -> None:
        """Take up new replicas, and forget those that are gone."""
        try:
            super().update_replicas(replicas)
        except RayActorError:
            self._plant_again()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """Send no more requests to a replica."""
        try:
            super().on_replica_actor_died(replica_id)
        except RayActorError:
            self._plant_again()

    def _plant(self) -> None:
        """Find the tree, or make it: beside Serve's controller.

        Ray's router, which finds it then, would make it on any node with a free CPU, which for it
        would never be idle, nor be drained.
        """
        if "tree_actor" not in self._options:
            PrefixTreeActor.options(
                name=TREE_NAME,
                namespace="::".join(
                    (SERVE_NAMESPACE, self._deployment_id.app_name, self._deployment_id.name)
                ),
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                resources={HEAD_NODE_RESOURCE_NAME: 0.001},
            ).remote()
        super().initialize_state(**self._options)

    def _plant_again(self) -> None:
        """A new tree, in the place of one that was lost with its node."""
        self._plant()
        names = [replica.replica_id.to_full_id_str() for replica in self._replicas.values()]
        self._tree_actor.add_tenants.remote(names, time.time())
        self._tree_actor.start_eviction_loop.remote(
            self._eviction_threshold_chars,
            self._eviction_target_chars,
            self._eviction_interval_secs,
        )
        self._eviction_loop_running = True


def _text_of(pending_request: Any) -> str | None:
    """What `Router` read out of a request; of one that came another way, nothing."""
    text = next(iter(pending_request.args), None) if pending_request is not None else None
    return text if isinstance(text, str) else None
