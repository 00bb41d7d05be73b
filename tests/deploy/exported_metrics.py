"""The metrics that the endpoint, its engines and Ray Serve define, as Ray exports them.

Ray puts `ray_` in front of a name, `_total` behind a counter's, and `_` for what OpenTelemetry does
not take; a histogram is exported as `_bucket`, `_sum` and `_count`. Names are read from the source
of what defines them: most are registered in processes of their own, as they start.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

# Where metrics that a dashboard may show are defined.
SOURCES = (
    "gem_vllm.serving.endpoint",
    "gem_vllm.plugin",
    "ray.serve._private",
    "vllm.v1.metrics",
)
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


def exported_names() -> frozenset[str]:
    """The names of all series that a node of Ray may export for an endpoint."""
    names: set[str] = set()
    for kind, name in _definitions():
        plain = "ray_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        if kind == "counter":
            plain = plain.removesuffix("_total")
        names.update(plain + suffix for suffix in _SUFFIXES[kind])
    return frozenset(names)


def _definitions() -> Iterator[tuple[str, str]]:
    """Kind and name of every metric that `SOURCES` make."""
    for package in SOURCES:
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        for folder in spec.submodule_search_locations:
            for file in sorted(Path(folder).rglob("*.py")):
                yield from _definitions_in(ast.parse(file.read_text(encoding="utf-8")))


def _definitions_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Calls such as `Counter("name")`, `metrics.Gauge(...)` and `self._histogram_cls(name=...)`.

    Not those of prometheus_client: Ray does not export what a process registers there.
    """
    not_rays = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client"
        for alias in node.names
    }
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in not_rays:
            continue
        made = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
        kinds = [kind for kind in _SUFFIXES if kind in made.lower()]
        named = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
        for argument in (named or node.args)[:1]:
            if isinstance(argument, ast.Name):
                argument = constants.get(argument.id, argument)
            if kinds and isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield kinds[0], argument.value
