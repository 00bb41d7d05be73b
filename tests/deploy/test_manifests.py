"""What the manifests say in several places fits together."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from ray.scripts.scripts import cli as ray_command_line

from gem_vllm.serving.ray_settings import RAY_SETTINGS
from tests.deploy.conftest import (
    DEPLOY,
    MANIFESTS,
    ROOT,
    check_serve_config,
    load_manifest,
    replicas_of,
    run_entrypoint,
    serve_config_of,
)
from tests.deploy.kuberay import cluster_of, groups_of


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    return container


def extra(name: str) -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"][name]
    return Requirement(requirement)


def test_workers_have_room_for_the_replicas(
    manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas = replicas_of(manifest, monkeypatch)
    _, workers = groups_of(manifest)
    limits = container_of(workers)["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == replicas.tensor_parallel
    # The front end, or Ray Data's readers, run beside the engine.
    assert replicas.cpus is not None
    assert int(limits["cpu"]) > replicas.cpus
    assert workers["maxReplicas"] == replicas.max_replicas
    assert workers["minReplicas"] == replicas.min_replicas >= 1


def test_the_object_store_fits_in_shared_memory(manifest: dict[str, Any]) -> None:
    """Ray puts a larger one on the disk; half is left for what a replica's workers share."""
    for group in groups_of(manifest):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        gibibytes = volumes["shared-memory"]["emptyDir"]["sizeLimit"].removesuffix("Gi")
        assert int(group["rayStartParams"]["object-store-memory"]) <= int(gibibytes) << 29


def test_the_head_has_no_work(manifest: dict[str, Any]) -> None:
    head, _ = groups_of(manifest)
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_a_worker_that_goes_answers_what_it_has_taken(service: dict[str, Any]) -> None:
    options = check_serve_config(serve_config_of(service))
    _, workers = groups_of(service)
    *_, script = container_of(workers)["lifecycle"]["preStop"]["exec"]["command"]
    drain, _, _ = script.partition("&&")
    limit, seconds, ray, command, *arguments = shlex.split(drain)
    assert (limit, ray, command) == ("timeout", "ray", "drain-node")
    asked = ray_command_line.commands[command].make_context(command, arguments).params
    deadline = asked["deadline_remaining_seconds"]
    grace = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.request_timeout_s < deadline <= grace - int(seconds)
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > options.request_timeout_s


def test_mounts_are_where_the_options_look(
    manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an endpoint on the head, too: Ray builds the application on any node."""
    _, workers = groups = groups_of(manifest)
    if manifest["kind"] == "RayService":
        options = check_serve_config(serve_config_of(manifest))
        looking, paths = groups, [options.model, options.api_keys]
    else:
        looking, paths = [workers], [run_entrypoint(manifest, monkeypatch)[0].model]
    for group in looking:
        mounts = [Path(mount["mountPath"]) for mount in container_of(group)["volumeMounts"]]
        for path in paths:
            assert path is not None
            assert path.parent in mounts


def test_volumes_are_mounted(manifest: dict[str, Any]) -> None:
    for group in groups_of(manifest):
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert volumes == {mount["name"] for mount in container_of(group)["volumeMounts"]}


def test_every_pod_is_scraped_where_ray_exports(manifest: dict[str, Any]) -> None:
    for group in groups_of(manifest):
        annotations = group["template"]["metadata"]["annotations"]
        assert annotations["prometheus.io/scrape"] == "true"
        ports = {port["name"]: port["containerPort"] for port in container_of(group)["ports"]}
        # KubeRay starts Ray with --metrics-export-port 8080 where nothing else is said.
        assert "metrics-export-port" not in group["rayStartParams"]
        assert annotations["prometheus.io/port"] == str(ports["metrics"]) == "8080"


def test_ray_is_the_extras(manifest: dict[str, Any]) -> None:
    assert cluster_of(manifest)["rayVersion"] in extra("ray").specifier


def test_the_image_is_built_with_the_extras_vllm() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    (version,) = re.findall(r"^FROM \S+:v(\S+)$", dockerfile, re.MULTILINE)
    assert version in extra("cuda").specifier
    groups = [group for name in MANIFESTS for group in groups_of(load_manifest(name))]
    (image,) = {container_of(group)["image"] for group in groups}
    assert f" -t {image} " in dockerfile


def test_the_image_has_the_settings_of_the_command_line() -> None:
    lines = re.findall(r"^ENV (\w+)=(.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {name: value.strip('"') for name, value in lines} == RAY_SETTINGS
