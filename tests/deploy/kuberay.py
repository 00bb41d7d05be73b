"""What KubeRay accepts, as far as our manifests use it.

No package ships KubeRay's own schemas. The fields, their types and the rules below are those of the
API reference of KubeRay v1.6.2 (`ray.io/v1`); a field that is not named here is refused, so that no
typing error passes. What is Kubernetes' own inside of them (metadata, pod templates, the autoscaler
as a container) is checked against Kubernetes' OpenAPI schemas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate

# The oldest and the newest Kubernetes that the manifests are held against.
KUBERNETES = ("1.30", "1.37")

_COUNT = {"type": "integer", "minimum": 0}
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_KUBERNETES_OWN: dict[str, Any] = {}  # checked against Kubernetes' schemas


def _object(required: str = "", **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _one_of(*values: str) -> dict[str, Any]:
    return {"enum": list(values)}


# Fields of a container that `autoscalerOptions` sets.
_CONTAINER = ("resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts")
_AUTOSCALER = _object(
    version=_one_of("v1", "v2"),
    upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
    idleTimeoutSeconds=_COUNT,
    **dict.fromkeys(_CONTAINER, _KUBERNETES_OWN),
)
_GROUP = {
    "rayStartParams": _STRINGS,
    "resources": _STRINGS,
    "labels": _STRINGS,
    "template": _KUBERNETES_OWN,
}
_CLUSTER = {
    **_object(
        "headGroupSpec",
        rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
        authOptions=_object(
            mode=_one_of("disabled", "token"),
            secretName={"type": "string"},
        ),
        enableInTreeAutoscaling={"type": "boolean"},
        autoscalerOptions=_AUTOSCALER,
        gcsFaultToleranceOptions=_object(
            redisAddress={"type": "string"},
            externalStorageNamespace={"type": "string"},
        ),
        headServiceAnnotations=_STRINGS,
        upgradeStrategy=_object(type=_one_of("Recreate", "None")),
        headGroupSpec=_object(
            "template",
            serviceType=_one_of("ClusterIP", "NodePort", "LoadBalancer"),
            enableIngress={"type": "boolean"},
            **_GROUP,
        ),
        workerGroupSpecs={
            "type": "array",
            "items": _object(
                "groupName template",
                groupName={"type": "string", "minLength": 1},
                replicas=_COUNT,
                minReplicas=_COUNT,
                maxReplicas=_COUNT,
                numOfHosts=_COUNT,
                idleTimeoutSeconds=_COUNT,
                **_GROUP,
            ),
        },
    ),
    # A token needs a Ray that is known to have them.
    "dependentRequired": {"authOptions": ["rayVersion"]},
}
_RAY_SERVICE = _object(
    "rayClusterConfig serveConfigV2",
    serveConfigV2={"type": "string"},
    rayClusterConfig=_CLUSTER,
    upgradeStrategy=_object(type=_one_of("NewCluster", "None")),
    rayClusterDeletionDelaySeconds=_COUNT,
    excludeHeadPodFromServeSvc={"type": "boolean"},
)
_RAY_JOB = {
    **_object(
        "rayClusterSpec entrypoint",
        entrypoint={"type": "string", "minLength": 1},
        rayClusterSpec=_CLUSTER,
        runtimeEnvYAML={"type": "string"},
        jobId={"type": "string"},
        metadata=_STRINGS,
        submissionMode=_one_of("K8sJobMode", "HTTPMode", "SidecarMode"),
        submitterConfig=_object(backoffLimit=_COUNT),
        submitterPodTemplate=_KUBERNETES_OWN,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        entrypointResources={"type": "string"},
        backoffLimit=_COUNT,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        preRunningDeadlineSeconds={"type": "integer", "minimum": 1},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=_COUNT,
        suspend={"type": "boolean"},
    ),
    "if": {
        "properties": {"ttlSecondsAfterFinished": {"minimum": 1}},
        "required": ["ttlSecondsAfterFinished"],
    },
    "then": {
        "properties": {"shutdownAfterJobFinishes": {"const": True}},
        "required": ["shutdownAfterJobFinishes"],
    },
}
_SPECS = {"RayService": _RAY_SERVICE, "RayJob": _RAY_JOB}


def validate(manifest: dict[str, Any]) -> None:
    """Check a RayService or RayJob whole.

    Raises:
        jsonschema.ValidationError: where KubeRay or Kubernetes would refuse or ignore something.
    """
    schema = _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind=_one_of(*_SPECS),
        metadata=_KUBERNETES_OWN,
        spec=_SPECS.get(manifest.get("kind", ""), {}),
    )
    jsonschema.Draft202012Validator(schema).validate(manifest)
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
    for version in KUBERNETES:
        for resource in (metadata, *_kubernetes_resources(manifest["spec"])):
            kubernetes_validate.validate(resource, version, strict=True)


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    """The `RayClusterSpec` of a manifest."""
    spec = manifest["spec"]
    return spec["rayClusterConfig" if manifest["kind"] == "RayService" else "rayClusterSpec"]


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of nodes of a manifest's cluster, the head's first."""
    cluster = cluster_of(manifest)
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def _kubernetes_resources(node: Any) -> Iterator[dict[str, Any]]:
    """Everything below ``node`` that Kubernetes has a schema of, as a resource of its own."""
    if isinstance(node, list):
        for item in node:
            yield from _kubernetes_resources(item)
    elif isinstance(node, dict):
        for name, value in node.items():
            if name in ("template", "submitterPodTemplate"):
                yield {"apiVersion": "v1", "kind": "PodTemplate", "template": value}
            elif name == "autoscalerOptions":
                container = {field: value[field] for field in _CONTAINER if field in value}
                pod = {"containers": [{"name": "autoscaler", **container}]}
                yield {"apiVersion": "v1", "kind": "PodTemplate", "template": {"spec": pod}}
            else:
                yield from _kubernetes_resources(value)
