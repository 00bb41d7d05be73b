"""Replicas of a GEM checkpoint behind one endpoint, on Ray Serve (`gem-vllm serve`).

A request goes from the proxy of a node (HAProxy) to a replica, which the router has named to it:

| module | what |
|---|---|
| `application` | the Serve application; `app` is what a config file names |
| `router` | the process that the proxy asks for a replica |
| `prefix_routing` | the replica that has a request's beginning in its prefix cache |
| `server` | Ray's LLM server, as an HTTP server that runs vLLM's own application |
| `door` | in front of that application: keys, limits, 429 and 503, draining |
| `exchange` | a request's two ends at the door: its client, and vLLM |
| `request_facts` | what is read out of a request |
| `engine` | Ray's vLLM engine, without what a local checkpoint does not need |
| `keys` | API keys |
| `metrics` | counts by task, and the whole cluster's metrics on one page |
| `lasting_gauge` | a gauge that stays on that page |
| `options` | what an endpoint is asked to be |
| `operate` | start, watch, drain and stop an endpoint (`gem-vllm serve`) |
"""

from gem_vllm.serving.endpoint.application import app

__all__ = ["app"]
