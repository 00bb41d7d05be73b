"""``gem-vllm serve``: replicas of a checkpoint behind one endpoint, on Ray Serve."""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from gem_vllm.commands.json_option import json_object
from gem_vllm.commands.on_ray import exit_codes, require_ray
from gem_vllm.errors import GemError


def serve(
    model: Annotated[Path, typer.Argument(help="A GEM checkpoint; the same folder on every node.")],
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on.", show_default="127.0.0.1; with --print-config 0.0.0.0"
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name that requests give.", show_default="the folder's")
    ] = None,
    min_replicas: Annotated[int, typer.Option(help="Engines that are kept running.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option(help="Engines while there is more to do.", show_default="--min-replicas"),
    ] = None,
    target_ongoing_requests: Annotated[
        float, typer.Option(help="Of a replica: more start another one, less stop one.")
    ] = 64,
    cpus_per_replica: Annotated[
        float | None,
        typer.Option(help="Cores of an engine.", show_default="its share; 1 with a GPU"),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs of an engine.")] = 1,
    max_ongoing_requests: Annotated[
        int, typer.Option(help="Requests that an engine works on at once.")
    ] = 256,
    max_queued_requests: Annotated[
        int, typer.Option(help="Requests that wait for that engine; one more gets 429.")
    ] = 512,
    request_timeout: Annotated[float, typer.Option(help="Seconds for a request.")] = 600.0,
    max_inputs: Annotated[
        int, typer.Option(help="Texts, prompts or conversations in one request.")
    ] = 2048,
    max_body_mb: Annotated[float, typer.Option(help="Size of a request, in MiB.")] = 16.0,
    api_keys: Annotated[
        Path | None,
        typer.Option(help="File of keys (gem-vllm key) that are let in.", show_default="open"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Options of the vLLM engine, as JSON: '{\"max_model_len\": 2048}'.")
    ] = "{}",
    ray_address: Annotated[
        str | None,
        typer.Option(help="A running cluster, for example auto.", show_default="this machine"),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the file for `serve deploy` and stop.")
    ] = False,
) -> None:
    """Serve embeddings and chat from several engines behind one OpenAI-compatible endpoint.

    Every replica answers both kinds of request. Ctrl-C or SIGTERM takes no new requests, answers
    those that it has, and stops. For a cluster that runs without this process, write the file for
    Ray's own `serve deploy` with --print-config.
    """
    require_ray("serve")
    from gem_vllm.serving.ray_settings import own_ray_settings

    # Before Ray Serve is imported, which reads them then.
    with own_ray_settings() if ray_address is None else nullcontext():
        from gem_vllm.serving.endpoint.options import EndpointOptions

        options = EndpointOptions(
            model=model.absolute(),
            served_model_name=served_model_name,
            min_replicas=min_replicas,
            max_replicas=min_replicas if max_replicas is None else max_replicas,
            target_ongoing_requests=target_ongoing_requests,
            cpus_per_replica=cpus_per_replica,
            tensor_parallel_size=tensor_parallel_size,
            max_ongoing_requests=max_ongoing_requests,
            max_queued_requests=max_queued_requests,
            request_timeout_s=request_timeout,
            max_inputs=max_inputs,
            max_body_bytes=_bytes_of(max_body_mb),
            api_keys=None if api_keys is None else api_keys.absolute(),
            engine=json_object(engine),
        )
        if print_config:
            import yaml

            options.check()
            config = options.serve_config(host or "0.0.0.0", port)
            typer.echo(yaml.safe_dump(config, sort_keys=False), nl=False)
            return
        from gem_vllm.serving.endpoint.operate import run_endpoint

        def report(line: str) -> None:
            print(line, file=sys.stderr, flush=True)

        with exit_codes("stopped"):
            run_endpoint(options, host or "127.0.0.1", port, ray_address, report)


def _bytes_of(max_body_mb: float) -> int:
    if not math.isfinite(max_body_mb):
        raise GemError(f"--max-body-mb is {max_body_mb:g}; give a number of MiB")
    return int(max_body_mb * 2**20)
