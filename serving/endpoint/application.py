"""The Serve application: replicas from `ray.serve.llm`, each behind a door of its own."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import RequestRouterConfig

from gem_vllm.serving.endpoint.door import Limits
from gem_vllm.serving.endpoint.exchange import RETRY_AFTER_S
from gem_vllm.serving.endpoint.options import EndpointOptions
from gem_vllm.serving.pool import engine_needs

# Above what a request may take: a replica that is to stop answers what it has taken.
STOP_MARGIN_S = 30.0
ROUTED_AT_ONCE = 1000


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
    """The application for options that are checked.

    Where replicas may be several, and HAProxy is Serve's proxy, it asks a `Router` for each request
    which of them it goes to. A Serve with Ray's own proxy goes by load alone.
    """
    from ray.serve.llm import build_llm_deployment

    from gem_vllm.serving.endpoint.prefix_routing import PrefixRouting
    from gem_vllm.serving.endpoint.router import Router
    from gem_vllm.serving.endpoint.server import GemServer

    routed = options.max_replicas > 1 and RAY_SERVE_ENABLE_HA_PROXY
    routing = RequestRouterConfig(
        request_router_class=PrefixRouting,
        request_router_kwargs={
            "max_ongoing_requests": options.max_ongoing_requests,
            "do_eviction": True,
        },
    )
    limits = Limits(
        options.request_timeout_s,
        options.max_inputs,
        options.max_body_bytes,
        options.max_ongoing_requests,
        options.max_queued_requests,
    )
    replicas = build_llm_deployment(
        _llm_config(options),
        deployment_cls=serve.ingress()(GemServer),
        bind_kwargs={"limits": limits, "api_keys": options.api_keys},
        override_serve_options={"request_router_config": routing} if routed else None,
    )
    if not routed:
        return replicas
    router = serve.deployment(
        Router, max_ongoing_requests=ROUTED_AT_ONCE, ray_actor_options={"num_cpus": 0}
    )
    return replicas._with_ingress_request_router(router.bind(replicas, options.max_body_bytes))


def _llm_config(options: EndpointOptions) -> Any:
    from ray.serve.llm import LLMConfig

    from gem_vllm.serving.endpoint.engine import LocalCheckpoint

    (cpus, gpus), environment, engine = engine_needs(options.replicas())
    # As Ray's server has it: an engine core in a process of its own, workers by Ray on GPUs.
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    engine.pop("distributed_executor_backend", None)
    # No key of vLLM's own: the door has those that are let in.
    environment["VLLM_API_KEY"] = ""
    most = 2 * (options.max_ongoing_requests + options.max_queued_requests)
    return LLMConfig(
        model_loading_config={
            "model_id": options.model_name,
            "model_source": str(options.model.absolute()),
        },
        engine_kwargs=engine,
        callback_config={"callback_class": LocalCheckpoint},
        accelerator_config={"kind": "gpu" if gpus else "cpu"},
        placement_group_config={
            "bundles": [{"CPU": cpus, "GPU": 1}, *[{"GPU": 1}] * (int(gpus) - 1)]
            if gpus
            else [{"CPU": cpus}],
            # A replica's GPUs are of one node, unless it is a pipeline.
            "strategy": "PACK" if engine.get("pipeline_parallel_size", 1) > 1 else "STRICT_PACK",
        },
        runtime_env={"env_vars": environment},
        deployment_config={
            "ray_actor_options": {"num_cpus": 0},
            "autoscaling_config": {
                "min_replicas": options.min_replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": options.target_ongoing_requests,
            },
            # More than the door lets in and has wait: what is above that reaches it for its 429. A
            # flood beyond even that is answered with 429 by Serve, whose Retry-After is always the
            # same.
            "max_ongoing_requests": most,
            "max_queued_requests": most,
            "backpressure_config": {"status_code": 429, "retry_after_s": RETRY_AFTER_S},
            "graceful_shutdown_timeout_s": options.request_timeout_s + STOP_MARGIN_S,
        },
    )
