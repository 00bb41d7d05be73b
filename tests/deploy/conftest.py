"""The files of `deploy/`, and what they ask gem-vllm for."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from gem_vllm.cli import app
from gem_vllm.serving.endpoint.options import EndpointOptions
from gem_vllm.serving.options import EmbedOptions, ReplicaOptions

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = ("rayservice", "rayjob")


def load(path: str) -> dict[str, Any]:
    """A YAML file of `deploy/`."""
    return yaml.safe_load((DEPLOY / path).read_text())


def load_manifest(name: str) -> dict[str, Any]:
    """One of `MANIFESTS`."""
    return load(f"kuberay/{name}.yaml")


def serve_config_of(service: dict[str, Any]) -> dict[str, Any]:
    """The Serve config in a RayService."""
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def check_serve_config(config: dict[str, Any]) -> EndpointOptions:
    """What a Serve config asks the endpoint for; a field that Ray would ignore fails."""
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.model_dump(mode="json", exclude_unset=True) == config
    (application,) = config["applications"]
    return EndpointOptions.from_dict(application["args"])


def run_entrypoint(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[EmbedOptions, ReplicaOptions]:
    """What the entry point of a RayJob asks `gem-vllm embed` for, which is not done.

    Raises:
        ValueError: the command line refuses it.
    """
    asked = []
    monkeypatch.setattr(
        "gem_vllm.serving.job.run_embed_job", lambda *arguments: asked.append(arguments) or {}
    )
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    result = CliRunner().invoke(app, arguments)
    if program != "gem-vllm" or result.exit_code:
        raise ValueError(result.output)
    ((options, replicas, _),) = asked
    return options, replicas


def replicas_of(manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ReplicaOptions:
    """The engines that a manifest asks for."""
    if manifest["kind"] == "RayService":
        return check_serve_config(serve_config_of(manifest)).replicas()
    return run_entrypoint(manifest, monkeypatch)[1]


@pytest.fixture
def service() -> dict[str, Any]:
    """The RayService."""
    return load_manifest("rayservice")


@pytest.fixture
def job() -> dict[str, Any]:
    """The RayJob."""
    return load_manifest("rayjob")


@pytest.fixture(params=MANIFESTS)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of the two."""
    return load_manifest(request.param)
