"""Which replica gets a request, by a tree and numbers of requests that are given."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from gem_vllm.serving.endpoint import prefix_routing
from gem_vllm.serving.endpoint.prefix_routing import IMBALANCE, PrefixRouting

DEPLOYMENT = DeploymentID("GemServer", "gem")
TEXT = "a" * 300


@dataclass
class Replica:
    """One that says how many requests it has, is dead (None), or never answers (-1)."""

    replica_id: ReplicaID
    load: int | None

    async def get_queue_len(self, *, deadline_s: float) -> int:
        if self.load is None:
            raise ActorDiedError()
        if self.load == -1:
            await asyncio.Event().wait()
        return self.load


class Tree:
    """Ray's prefix tree, in which the first replica has the whole text, or nobody has any of it."""

    def __init__(self, owner: Replica | None, smallest: Replica) -> None:
        self.owner, self.smallest = owner, smallest
        self.inserted: list[str] = []
        self.prefix_match = SimpleNamespace(remote=self._match)
        self.get_smallest_tenants = SimpleNamespace(remote=self._smallest)
        self.insert = SimpleNamespace(remote=self._insert)

    async def _match(self, text: str, names: list[str]) -> tuple[str, list[str]]:
        return (text, [self.owner.replica_id.to_full_id_str()]) if self.owner else ("", names)

    async def _smallest(self) -> list[str]:
        return [self.smallest.replica_id.to_full_id_str()]

    def _insert(self, text: str, name: str, time: float) -> None:
        self.inserted.append(name)


@dataclass
class Choices:
    """What was chosen, by number of a replica, and what became of tree and replicas."""

    chosen: list[int]
    tree: Tree
    replicas: list[Replica]


def replicas_with(*loads: int | None) -> list[Replica]:
    return [Replica(ReplicaID(str(n), DEPLOYMENT), load) for n, load in enumerate(loads)]


def router_with(tree: Any, most: int = 256) -> Any:
    router = PrefixRouting(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    router.initialize_state(max_ongoing_requests=most, tree_actor=tree)
    return router


def choose(
    *loads: int | None, text: str | None = TEXT, times: int = 1, most: int = 256, owned: bool = True
) -> Choices:
    """Choose, once all replicas have been heard.

    Args:
        loads: requests of each replica; None for one that does not answer.
        text: of the request.
        times: to choose, one request after the other, before the replicas are asked again.
        most: requests that a replica works on.
        owned: whether the first replica has the text; otherwise the last has least of all texts.
    """

    async def run() -> Choices:
        replicas = replicas_with(*loads)
        tree = Tree(replicas[0] if owned else None, replicas[-1])
        router = router_with(tree, most)
        request = SimpleNamespace(args=[text])
        await router.choose_replicas(replicas, None)
        await asyncio.gather(*router._asking.values())
        router._chosen_since.clear()
        tree.inserted.clear()
        chosen = []
        for _ in range(times):
            ((replica,),) = await router.choose_replicas(replicas, request)
            chosen.append(replicas.index(replica))
        return Choices(chosen, tree, replicas)

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas are asked once in a test."""
    monkeypatch.setattr(prefix_routing, "LOAD_SECONDS", 1e6)


@pytest.mark.parametrize("loads", [(0, 0), (IMBALANCE, 0), (5, 3), (0, 8), (200, 199)])
def test_a_text_goes_where_its_beginning_is(loads: tuple[int, ...]) -> None:
    choices = choose(*loads)
    assert choices.chosen == [0]
    assert choices.tree.inserted == [choices.replicas[0].replica_id.to_full_id_str()]


@pytest.mark.parametrize("loads", [(IMBALANCE + 1, 0), (30, 20), (256, 255)])
def test_load_decides_where_that_one_has_much_more_to_do_or_is_full(loads: tuple[int, ...]) -> None:
    assert choose(*loads).chosen == [1]


def test_load_decides_where_the_replica_is_full() -> None:
    assert choose(4, 1, most=4).chosen == [1]
    assert choose(3, 1, most=4).chosen == [0]


def test_a_new_text_goes_where_the_least_of_all_texts_is() -> None:
    assert choose(3, 0, 3, owned=False).chosen == [2]
    assert choose(0, 0, IMBALANCE + 1, owned=False).chosen[0] in (0, 1)


def test_what_was_chosen_since_counts_as_well() -> None:
    counts = Counter(choose(10, 0, 4, text=None, times=16).chosen)
    assert counts == {1: 10, 2: 6}
    # The text's owner, until it has so many more than another.
    assert choose(0, 0, times=IMBALANCE + 3).chosen == [0] * (IMBALANCE + 1) + [1, 0]


def test_a_request_without_a_text_is_not_in_the_tree() -> None:
    choices = choose(2, 0, text=None)
    assert choices.chosen == [1]
    assert choices.tree.inserted == []


def test_a_replica_that_has_not_said_yet_has_what_it_was_chosen_for() -> None:
    assert choose(2, None, text=None).chosen == [1]


@pytest.mark.parametrize("silent", [-1, None], ids=["hangs", "dead"])
def test_a_replica_that_never_answers_is_soon_left_alone(
    monkeypatch: pytest.MonkeyPatch, silent: int | None
) -> None:
    monkeypatch.setattr(prefix_routing, "LOAD_SECONDS", 0.0)
    monkeypatch.setattr(prefix_routing, "ANSWER_SECONDS", 0.01)

    async def run() -> Counter[int]:
        replicas = replicas_with(silent, 5, 5)
        router = router_with(Tree(None, replicas[0]))
        chosen: Counter[int] = Counter()
        for _ in range(100):
            ((replica,),) = await router.choose_replicas(replicas, None)
            chosen[replicas.index(replica)] += 1
            await asyncio.sleep(0.001)
        return chosen

    chosen = asyncio.run(run())
    assert chosen[0] <= 7
    assert min(chosen[1], chosen[2]) > 20


def test_a_new_tree_is_kept_small_as_the_lost_one_was() -> None:
    calls: list[str] = []

    class Actor:
        def __getattr__(self, name: str) -> Any:
            return SimpleNamespace(remote=lambda *args: calls.append(name))

    tree = Actor()
    router = router_with(tree)
    router._options = {"tree_actor": tree}
    router._plant_again()
    assert calls == ["add_tenants", "start_eviction_loop"]


def test_one_replica_is_chosen_without_the_tree() -> None:
    choices = choose(500)
    assert choices.chosen == [0]
    assert choices.tree.inserted == []
