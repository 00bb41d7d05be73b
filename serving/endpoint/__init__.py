"""Replicas of a GEM checkpoint behind one endpoint, on Ray Serve (`gem-vllm serve`).

A request goes from Serve's HTTP proxy to an ingress, and from there to a replica:

| module | what |
|---|---|
| `application` | the Serve application; `app` is what a config file names |
| `ingress` | keys, limits, 429 and 503, retries, draining |
| `router` | the replica that has a request's beginning in its prefix cache |
| `server` | Ray's LLM server, answering through vLLM's own HTTP application |
| `engine` | Ray's vLLM engine, without what a local checkpoint does not need |
| `messages` | what travels between ingress and server |
| `keys` | API keys |
| `metrics` | counts by task, and the whole cluster's metrics on one page |
| `options` | what an endpoint is asked to be |
| `operate` | start, watch, drain and stop an endpoint (`gem-vllm serve`) |
"""

from gem_vllm.serving.endpoint.application import app

__all__ = ["app"]
