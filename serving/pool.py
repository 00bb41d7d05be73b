"""Engines as actors: Ray itself, and a Ray Data actor pool in which each actor has one."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray

from gem_vllm.errors import GemError
from gem_vllm.machine import is_cpu_build, serve_dtype, serve_environment
from gem_vllm.serving.options import ReplicaOptions

# While one call of an actor waits for its last rows, the next one's are with the engine.
CALLS_IN_FLIGHT = 2
# An actor that is killed is made anew. One that is killed again and again, as by a lack of memory,
# is not: the job then ends within a minute, and is gone on with when there is more. Calls need no
# bound of their own: they fail with the actor. (One would be used up in a second by a node that is
# gone, in the time until Ray knows that it is.)
RESTARTS, CALL_RETRIES = 3, -1
_RESOURCES = ("CPU", "GPU")


@contextmanager
def ray_cluster(replicas: ReplicaOptions) -> Iterator[None]:
    """Ray, of this job's own unless an address is given or this process is connected already.

    Raises:
        GemError: the address does not answer; or this machine, alone, has no room for the replicas
            that are to be kept, or a Python that Ray cannot start.
    """
    if ray.is_initialized():
        yield
        return
    # Without "local" it would be whichever Ray the environment or `ray start` has named.
    address = replicas.ray_address or "local"
    if address == "local" and any(map(str.isspace, sys.executable)):
        raise GemError(
            f"Ray starts no process by {sys.executable}, whose path has a space; install gem-vllm "
            "in a folder without one"
        )
    try:
        with _own_sigterm_handler():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise GemError(f"--ray-address {address}: {error}") from error
    try:
        if address == "local":
            check_room(replicas)
        else:
            tell_what_is_waited_for(replicas)
        yield
    finally:
        ray.shutdown()


def check_room(replicas: ReplicaOptions) -> None:
    """GemError where this machine is too small: Ray would wait for another one for ever."""
    (cpus, gpus), _, _ = engine_needs(replicas)
    resources = ray.cluster_resources()
    for name, each in zip(_RESOURCES, (cpus, gpus), strict=True):
        there, needed = resources.get(name, 0), replicas.min_replicas * each
        if needed > there:
            raise GemError(
                f"--min-replicas {replicas.min_replicas} takes {needed:g} {name}s, {each:g} for "
                f"each; this machine has {there:g}"
            )


def tell_what_is_waited_for(replicas: ReplicaOptions) -> None:
    """Say so where no node of a cluster could hold a replica: one that can may join, or never.

    Not of pipelines, which an endpoint may spread over nodes.
    """
    if replicas.engine.get("pipeline_parallel_size", 1) > 1:
        return
    (cpus, gpus), _, _ = engine_needs(replicas)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = (node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes)
    if not any(fits):
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in _RESOURCES}
        print(
            f"no node of the cluster has the {cpus:g} CPUs and {gpus:g} GPUs of a replica now (the "
            f"most are {most['CPU']:g} and {most['GPU']:g}); waiting for one to join",
            file=sys.stderr,
        )


@contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Keep this process's handler of SIGTERM, in whose place `ray.init` puts one that exits."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def map_in_pool(
    rows: ray.data.Dataset,
    actor: type,
    replicas: ReplicaOptions,
    *,
    most_actors: int | None,
    batch_size: int,
    arguments: Mapping[str, Any],
) -> ray.data.Dataset:
    """`rows.map_batches(actor)`, in actors with the cores or GPUs of an engine each.

    Args:
        rows: to map.
        actor: a callable class; two threads call it.
        replicas: how many, with what.
        most_actors: of use; None for `replicas.max_replicas`.
        batch_size: rows of a call.
        arguments: of the class, besides "engine": the options of vLLM's engine.
    """
    rows.context.enable_progress_bars = False
    # A call is done when its rows are written, which may take an hour where texts and answers are
    # long: Ray's own bound on a time without an output, half an hour, would end the job.
    rows.context.execution_no_progress_timeout_s = -1
    # A node on which actors cannot start is not the end where others can.
    rows.context.max_consecutive_actor_init_deaths = RESTARTS
    # One more actor as soon as all have as many calls as they are given: Ray's own threshold is
    # meant for calls that queue at an actor, which would bind shards to it that others could do.
    rows.context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    (cpus, gpus), environment, engine = engine_needs(replicas)
    most = min(replicas.max_replicas, most_actors or replicas.max_replicas)
    with warnings.catch_warnings():
        # Ray 2.60 has no other way yet to bound the restarts, which it leaves without bound.
        warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")
        return rows.map_batches(
            actor,
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(
                min_size=min(replicas.min_replicas, most),
                max_size=most,
                max_tasks_in_flight_per_actor=CALLS_IN_FLIGHT,
                max_concurrent_calls_per_actor=CALLS_IN_FLIGHT,
                enable_true_multi_threading=True,
            ),
            fn_constructor_kwargs={**arguments, "engine": engine},
            runtime_env={"env_vars": environment},
            num_cpus=cpus,
            num_gpus=gpus,
            ray_remote_args_fn=lambda: {
                "max_restarts": RESTARTS,
                "max_task_retries": CALL_RETRIES,
            },
        )


def engine_needs(
    replicas: ReplicaOptions,
) -> tuple[tuple[float, float], dict[str, str], dict[str, Any]]:
    """CPUs and GPUs, the environment and the engine's options of an actor."""
    engine, workers = dict(replicas.engine), replicas.workers()
    if replicas.tensor_parallel > 1:
        engine["tensor_parallel_size"] = replicas.tensor_parallel
    if workers > 1:
        engine["distributed_executor_backend"] = "mp"
    # The engine in the actor's own process: it ends when the actor is killed.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
    # Not by the GPUs that there are: nodes with GPUs may join when there is work for them.
    if not is_cpu_build():
        return (replicas.cpus or 1, workers), environment, engine
    engine.setdefault("dtype", serve_dtype())
    served = serve_environment()
    kept = ("LD_PRELOAD", "VLLM_USE_AOT_COMPILE")
    environment |= {name: served[name] for name in kept if name in served}
    # One engine gets the cores themselves; of several, none knows which are the others'.
    alone = replicas.max_replicas == workers == 1
    bound_to = served.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    environment["VLLM_CPU_OMP_THREADS_BIND"] = bound_to if alone else "nobind"
    cpus = replicas.cpus or _share_of_cpus(replicas.max_replicas)
    environment["OMP_NUM_THREADS"] = str(max(1, int(cpus) // workers))
    return (cpus, 0), environment, engine


def _share_of_cpus(replicas: int) -> int:
    """Of the nodes' CPUs, the most that so many replicas can have each; 1 where they cannot."""
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    shares = range(max(nodes, default=1), 1, -1)
    return next((cpus for cpus in shares if sum(n // cpus for n in nodes) >= replicas), 1)
