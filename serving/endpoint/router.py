"""Which replica gets a request: one that has its beginning in the prefix cache, if it has room.

Ray's router keeps a tree of the texts that each replica was sent. It takes a chat or a completion
as Ray's own ingress passes it; here it gets the text that the ingress took out of the request, of
whichever task, so that embedding a document and asking about it meet in one cache.
"""

from __future__ import annotations

import time
from typing import Any

from ray.exceptions import RayActorError

# Not from `ray.serve.llm.request_router`, which would have every ingress import vLLM and torch.
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,
)

from gem_vllm.serving.endpoint.messages import ForwardedRequest

# Of running and queued requests, from which on load decides and not the cache.
IMBALANCE = 8
ROUTER_OPTIONS = {"imbalanced_threshold": IMBALANCE, "do_eviction": True}


class GemRouter(PrefixCacheAffinityRouter):
    """`request_router_class` of an endpoint's replicas."""

    def initialize_state(self, **options: Any) -> None:
        """Find the tree of this deployment, or make it."""
        self._options = options
        super().initialize_state(**options)

    def _extract_text_from_request(self, pending_request: Any) -> str | None:
        # Ray's raises for what has no prompt, and the request then waits for ever.
        request = next(iter(pending_request.args), None)
        return request.routing_text if isinstance(request, ForwardedRequest) else None

    async def _prefix_match_best_replicas(
        self, pending_request: Any, candidate_replicas: list[Any]
    ) -> list[list[Any]]:
        """The replicas that have most of a text; none, which leaves it to the load, for the rest.

        As Ray's, without its waits: they would stop all that the ingress does meanwhile. A replica
        whose queue is not known counts as idle: Ray, which then chooses by load, asks it.
        """
        text = self._extract_text_from_request(pending_request)
        if text is None or len(candidate_replicas) < 2:
            return [[]]
        replicas = {replica.replica_id.to_full_id_str(): replica for replica in candidate_replicas}
        queues = {
            name: self._replica_queue_len_cache.get(replica.replica_id) or 0
            for name, replica in replicas.items()
        }
        if max(queues.values()) - min(queues.values()) > self._imbalanced_threshold:
            return [[]]
        try:
            matched, names = await self._tree_actor.prefix_match.remote(text, list(replicas))
            if len(matched) < self._match_rate_threshold * len(text):
                names = await self._tree_actor.get_smallest_tenants.remote()
        except RayActorError:
            self._plant_again()
            return [[]]
        # The tree may know a replica longer than it lives.
        known = [name for name in names or () if name in replicas]
        free = [name for name in known if queues[name] < replicas[name].max_ongoing_requests]
        return [[replicas[name] for name in free]]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note the text of a request with the replica that got it; nobody waits for it."""
        text = self._extract_text_from_request(pending_request)
        if text is not None and len(self._replicas) > 1:
            self._tree_actor.insert.remote(text, replica_id.to_full_id_str(), time.time())

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

    def _plant_again(self) -> None:
        """A new tree, in the place of one that was lost with its node."""
        self.initialize_state(**self._options)
        names = [replica.replica_id.to_full_id_str() for replica in self._replicas.values()]
        self._tree_actor.add_tenants.remote(names, time.time())
