"""Which replica gets a request: one that has its beginning in the prefix cache, if it has room.

Ray's router keeps a tree of the texts that each replica was sent. It takes a chat or a completion
as Ray's own ingress passes it; here it gets the text that the ingress took out of the request, of
whichever task, so that embedding a document and asking about it meet in one cache.
"""

from __future__ import annotations

import time
from typing import Any

import ray
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
        """Ray's choice; none, which leaves it to the load, where the tree is behind.

        It may name a replica that is gone (KeyError), or be gone itself with its node.
        """
        try:
            return await super()._prefix_match_best_replicas(pending_request, candidate_replicas)
        except KeyError:
            return [[]]
        except RayActorError:
            self._plant_again()
            return [[]]

    def on_request_routed(self, pending_request: Any, replica_id: Any, result: Any) -> None:
        """Note the text of a request with the replica that got it."""
        try:
            super().on_request_routed(pending_request, replica_id, result)
        except RayActorError:
            self._plant_again()

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
        self.initialize_state(**self._options)
        names = [replica.replica_id.to_full_id_str() for replica in self._replicas.values()]
        ray.get(self._tree_actor.add_tenants.remote(names, time.time()))
