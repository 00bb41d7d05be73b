"""The Serve config and the KubeRay manifests against their schemas: no typing error passes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from gem_vllm.errors import GemError
from tests.deploy.conftest import check_serve_config, load, run_entrypoint, serve_config_of
from tests.deploy.kuberay import validate

# What is below has names of the user's or of Ray's nodes, not fields.
FREE = ("annotations", "labels", "rayStartParams", "requests", "limits")


def holder_of(node: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        node = node[step]
    return node


def fields_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field of a manifest."""
    for key, value in enumerate(node) if isinstance(node, list) else node.items():
        if isinstance(key, str):
            yield (*path, key)
        if isinstance(value, dict | list) and key not in FREE:
            yield from fields_of(value, (*path, key))


def is_valid_misspelt(manifest: dict[str, Any], field: tuple[Any, ...]) -> bool:
    broken = copy.deepcopy(manifest)
    holder = holder_of(broken, field)
    holder[f"{field[-1]}x"] = holder.pop(field[-1])
    try:
        validate(broken)
    except jsonschema.ValidationError:
        return False
    return True


def test_manifests_are_valid(manifest: dict[str, Any]) -> None:
    validate(manifest)


def test_a_typing_error_in_any_field_is_found(manifest: dict[str, Any]) -> None:
    fields = list(fields_of(manifest))
    assert len(fields) > 100
    assert [field for field in fields if is_valid_misspelt(manifest, field)] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("spec", "rayClusterDeletionDelaySeconds"), "660"),
        (("spec", "upgradeStrategy", "type"), "Rolling"),
        (("spec", "serveConfigV2"), {"applications": []}),
        (("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "minReplicas"), -1),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "template", "spec"), {}),
    ],
)
def test_a_value_of_another_kind_is_found(
    field: tuple[Any, ...], value: Any, service: dict[str, Any]
) -> None:
    holder_of(service, field)[field[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(service)


def test_a_cluster_that_is_kept_has_no_time_to_live(job: dict[str, Any]) -> None:
    job["spec"]["shutdownAfterJobFinishes"] = False
    with pytest.raises(jsonschema.ValidationError):
        validate(job)


def test_the_serve_config_is_valid() -> None:
    check_serve_config(load("serve.yaml"))


def test_the_service_has_the_same_serve_config(service: dict[str, Any]) -> None:
    config = serve_config_of(service)
    check_serve_config(config)
    assert config == load("serve.yaml")


@pytest.mark.parametrize(
    "place",
    [
        (),
        ("http_options",),
        ("applications", 0),
        ("applications", 0, "args"),
    ],
)
def test_a_typing_error_in_the_serve_config_is_found(
    place: tuple[Any, ...], service: dict[str, Any]
) -> None:
    config = serve_config_of(service)
    holder_of(config, (*place, None))["max_replica"] = 1
    with pytest.raises((AssertionError, GemError, ValueError)):
        check_serve_config(config)


def test_the_job_is_a_gem_vllm_embed(job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options, replicas = run_entrypoint(job, monkeypatch)
    assert options.input.startswith("s3://")
    assert options.output.startswith("s3://")
    assert replicas.ray_address == "auto"
    assert job["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--modle /models/my-model", "No such option: --modle"),
        ("--max-replicas many", "Invalid value for '--max-replicas'"),
    ],
)
def test_an_option_that_embed_lacks_is_found(
    options: str, message: str, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job["spec"]["entrypoint"] += f" {options}"
    with pytest.raises(ValueError, match=message):
        run_entrypoint(job, monkeypatch)
