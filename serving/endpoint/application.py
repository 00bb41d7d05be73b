"""The Serve application: replicas from `ray.serve.llm`, and the ingress in front of them."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from gem_vllm.serving.endpoint.ingress import RETRY_AFTER_S, Ingress, Limits
from gem_vllm.serving.endpoint.options import EndpointOptions
from gem_vllm.serving.pool import engine_needs

# Above what a request may take: a replica that is to stop answers what it has taken.
STOP_MARGIN_S = 30.0
START_TRIES = 2


def app(args: dict[str, Any]) -> Application:
    """The application that a Serve config file names: `gem_vllm.serving.endpoint:app`.

    Args:
        args: of the config file; see `EndpointOptions`.

    Raises:
        GemError: what cannot work, in one line.
    """
    options = EndpointOptions.from_dict(args)
    options.check()
    return build(options)


def build(options: EndpointOptions) -> Application:
    """The application for options that are checked."""
    from ray.serve.llm import build_llm_deployment

    stop_s = options.request_timeout_s + STOP_MARGIN_S
    return serve.deployment(
        Ingress,
        num_replicas=options.ingress_replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_all_requests(options),
        max_queued_requests=_all_requests(options),
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_AFTER_S},
        graceful_shutdown_timeout_s=stop_s,
        # It needs no room of its own: a new one is there before an old one goes.
        max_surge_percent=100,
    ).bind(
        build_llm_deployment(_llm_config(options, stop_s)),
        Limits(options.request_timeout_s, options.max_inputs, options.max_body_bytes),
        options.api_keys,
    )


def _all_requests(options: EndpointOptions) -> int:
    """More than the replicas work on and queue: what is above that reaches an ingress for its 429.

    A flood beyond even that is answered with 429 by Serve's proxy, whose Retry-After is always a
    second.
    """
    return 2 * (options.max_replicas * options.max_ongoing_requests + options.max_queued_requests)


def _llm_config(options: EndpointOptions, stop_s: float) -> Any:
    from ray.serve.llm import LLMConfig

    from gem_vllm.serving.endpoint.engine import LocalCheckpoint
    from gem_vllm.serving.endpoint.router import ROUTER_OPTIONS, GemRouter
    from gem_vllm.serving.endpoint.server import GemServer

    (cpus, gpus), environment, engine = engine_needs(options.replicas())
    # As Ray's server has it: an engine core in a process of its own, workers by Ray on GPUs.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    engine.pop("distributed_executor_backend", None)
    # No key of vLLM's own: the ingress passes none on, and a replica would refuse everything.
    environment["VLLM_API_KEY"] = ""
    return LLMConfig(
        model_loading_config={
            "model_id": options.model_name,
            "model_source": str(options.model.absolute()),
        },
        server_cls=GemServer,
        engine_kwargs=engine,
        callback_config={"callback_class": LocalCheckpoint},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={
            "bundles": [{"CPU": cpus, "GPU": 1}, *[{"GPU": 1}] * (int(gpus) - 1)]
            if gpus
            else [{"CPU": cpus}]
        },
        runtime_env={"env_vars": environment},
        deployment_config={
            "ray_actor_options": {"num_cpus": 0},
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_ongoing_requests,
            },
            "max_ongoing_requests": options.max_ongoing_requests,
            "max_queued_requests": options.max_queued_requests,
            "max_constructor_retry_count": START_TRIES,
            "graceful_shutdown_timeout_s": stop_s,
            # The ingress logs every request.
            "logging_config": {"enable_access_log": False},
            "request_router_config": RequestRouterConfig(
                request_router_class=GemRouter, request_router_kwargs=ROUTER_OPTIONS
            ),
        },
    )
