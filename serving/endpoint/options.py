"""What an endpoint is asked to be, checked before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gem_vllm.errors import GemError
from gem_vllm.machine import check_engine_options
from gem_vllm.serving.endpoint.keys import ApiKeys
from gem_vllm.serving.options import ReplicaOptions, embedding_size
from gem_vllm.serving.ray_settings import MAX_TIMEOUT_S

APP_NAME = "gem"
MAX_PORT = 65535


@dataclass(frozen=True)
class EndpointOptions:
    """Replicas of one GEM checkpoint behind one endpoint; the `args` of a Serve config file.

    Attributes:
        model: folder of a GEM checkpoint, the same on every node.
        served_model_name: that requests name; None for the folder's name.
        min_replicas: kept running.
        max_replicas: started where there is room and more to do.
        target_ongoing_requests: running and queued requests of a replica, by which their number
            follows the load.
        cpus_per_replica: cores of a replica; None for an equal share of the cluster's, or, of one
            with GPUs, for 1.
        tensor_parallel_size: GPUs, or CPU worker processes, that share a replica's model.
        max_ongoing_requests: that a replica works on.
        max_queued_requests: that wait at a replica for those to be done; one more gets 429.
        request_timeout_s: of a request, its wait and its answer together.
        max_inputs: texts, prompts, documents or conversations in one request.
        max_body_bytes: of a request.
        api_keys: file of hashed keys, one a line (`keys`); None for an open endpoint.
        engine: further options of vLLM's engine (`EngineArgs`) and front end.
    """

    model: Path
    served_model_name: str | None = None
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 64
    cpus_per_replica: float | None = None
    tensor_parallel_size: int = 1
    max_ongoing_requests: int = 256
    max_queued_requests: int = 512
    request_timeout_s: float = 600.0
    max_inputs: int = 2048
    max_body_bytes: int = 16 << 20
    api_keys: Path | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_dict(args: Mapping[str, Any]) -> EndpointOptions:
        """The options as a config file gives them.

        Raises:
            GemError: an unknown name, a value of another type, or `model` is missing.
        """
        known = {field.name: field for field in fields(EndpointOptions)}
        for name, value in args.items():
            if name not in known:
                raise GemError(f"no option '{name}'; there are: {', '.join(known)}")
            if value == "":
                raise GemError(f"option '{name}' is empty; give a value, or leave it out")
            expected = _TYPES[str(known[name].type)]
            if isinstance(value, bool) or not isinstance(value, expected):
                raise GemError(f"option '{name}' is {value!r}, which is no {known[name].type}")
        if "model" not in args:
            raise GemError("option 'model' is missing; name the folder of a GEM checkpoint")
        paths = {name: Path(args[name]) for name in ("model", "api_keys") if args.get(name)}
        return EndpointOptions(**{**args, **paths})

    def check(self) -> None:
        """Raise GemError, in one line, for what cannot work."""
        embedding_size(self.model)
        self.replicas().check()
        for name, option in _OWN_OPTIONS.items():
            if name in self.engine:
                raise GemError(f"--engine has '{name}'; use {option}")
        if tls := sorted(name for name in self.engine if name.startswith("ssl_")):
            raise GemError(
                f"--engine has '{tls[0]}'; the endpoint speaks HTTP: have TLS end in front of it"
            )
        for name, shown in _LIMITS.items():
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise GemError(f"{shown} is {value:g}; it must be above 0, and finite")
        if self.request_timeout_s > MAX_TIMEOUT_S:
            raise GemError(
                f"{_LIMITS['request_timeout_s']} is {self.request_timeout_s:g}; it must be at most "
                f"{MAX_TIMEOUT_S:g}, as long as the proxy waits"
            )
        if self.api_keys is not None and not ApiKeys.read(self.api_keys).digests:
            raise GemError(
                f"{self.api_keys} has no key; add one with 'gem-vllm key', or leave the file out"
            )
        check_engine_options(self.engine, served=True)

    def replicas(self, ray_address: str | None = None) -> ReplicaOptions:
        """The engines, as batch jobs know them."""
        return ReplicaOptions(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            cpus=self.cpus_per_replica,
            tensor_parallel=self.tensor_parallel_size,
            engine=self.engine,
            ray_address=ray_address,
        )

    def serve_config(self, host: str, port: int) -> dict[str, Any]:
        """The file for `serve deploy`: this application, with these options.

        Raises:
            GemError: there is no such port.
        """
        if not 1 <= port <= MAX_PORT:
            raise GemError(f"--port is {port}; give one from 1 to {MAX_PORT}")
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        args = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in given.items()
            if value is not None
        }
        return {
            "proxy_location": "EveryNode",
            "http_options": {"host": host, "port": port},
            "applications": [
                {
                    "name": APP_NAME,
                    "route_prefix": "/",
                    "import_path": "gem_vllm.serving.endpoint:app",
                    "args": {**args, "engine": dict(self.engine)},
                }
            ],
        }

    @property
    def model_name(self) -> str:
        """That requests name."""
        return self.served_model_name or self.model.name


# By name, as a config file and the command line have it.
_LIMITS = {
    "target_ongoing_requests": "target_ongoing_requests",
    "max_ongoing_requests": "max_ongoing_requests",
    "max_queued_requests": "max_queued_requests",
    "request_timeout_s": "request_timeout_s (--request-timeout)",
    "max_inputs": "max_inputs",
    "max_body_bytes": "max_body_bytes (--max-body-mb)",
}
# vLLM's name of what has an option of its own here.
_OWN_OPTIONS = {
    "api_key": "--api-keys",
    "host": "--host",
    "port": "--port",
    "uds": "--host and --port",
    "served_model_name": "--served-model-name",
}
_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "str | None": (str, type(None)),
    "Path": (str, Path),
    "Path | None": (str, Path, type(None)),
    "Mapping[str, Any]": (Mapping,),
}
