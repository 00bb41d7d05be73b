"""The Grafana dashboard: can be imported, and asks for what is exported."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import promql_parser
import pytest

from tests.deploy.conftest import DEPLOY
from tests.deploy.exported_metrics import exported_names

ROWS = (
    "Traffic by task",
    "Latency by task",
    "Queue",
    "Tokens by task",
    "Engine steps",
    "KV cache",
    "Replicas",
)
# Every series has these labels: Ray sets the first, Prometheus the second.
LABELS = {"SessionName", "instance"}
# Of Serve's controller, on whatever node that is: nodes to choose from are those with replicas.
OF_THE_CONTROLLER = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_autoscaling_target_replicas",
    "ray_serve_replica_startup_latency_ms_count",
}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "gem-vllm.json").read_text())


@pytest.fixture(scope="module")
def graphs(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def expressions(graphs: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for graph in graphs for target in graph["targets"]]


def selectors_of(node: Any) -> list[promql_parser.VectorSelector]:
    """The series that a PromQL expression reads."""
    if isinstance(node, promql_parser.VectorSelector):
        return [node]
    if isinstance(node, promql_parser.MatrixSelector):
        return [node.vector_selector]
    children = [getattr(node, name, None) for name in ("expr", "lhs", "rhs")]
    children += getattr(node, "args", None) or []
    return [found for child in children if child is not None for found in selectors_of(child)]


def parsed(expression: str) -> list[promql_parser.VectorSelector]:
    """As `selectors_of`, of an expression as Grafana sends it."""
    return selectors_of(promql_parser.parse(expression.replace("$__rate_interval", "1m")))


def names_in(text: str) -> set[str]:
    """The metrics that a query of a variable names."""
    return set(re.findall(r"\bray_\w+", text))


def test_it_is_a_dashboard(dashboard: dict[str, Any]) -> None:
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["uid"]
    assert dashboard["title"]
    # Grafana gives it an id of its own.
    assert "id" not in dashboard
    rows = [panel["title"] for panel in dashboard["panels"] if panel["type"] == "row"]
    assert tuple(rows) == ROWS


def test_panels_are_told_apart_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in panels]
    assert len(set(titles)) == len(titles)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
        assert one["x"] + one["w"] <= 24


def test_every_graph_asks_the_chosen_data_source(
    dashboard: dict[str, Any], graphs: list[dict[str, Any]]
) -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    source, *others = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    for asking in (*others, *graphs, *(t for graph in graphs for t in graph["targets"])):
        assert asking["datasource"] == chosen


def test_every_graph_has_queries_that_parse(graphs: list[dict[str, Any]]) -> None:
    for graph in graphs:
        assert graph["targets"], graph["title"]
        letters = [target["refId"] for target in graph["targets"]]
        assert len(set(letters)) == len(letters)
        for target in graph["targets"]:
            assert parsed(target["expr"]), graph["title"]
            # What is told apart in the legend is kept by the query.
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert re.search(rf"by \([^)]*\b{label}\b", target["expr"]), graph["title"]


def test_a_query_that_does_not_parse_is_found() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        parsed('sum(rate(ray_gem_requests_total{task="embed"}[$__rate_interval])')


def test_every_metric_is_exported(dashboard: dict[str, Any], expressions: list[str]) -> None:
    asked = {selector.name for text in expressions for selector in parsed(text)}
    for variable in dashboard["templating"]["list"][1:]:
        asked |= names_in(variable["query"]["query"])
    assert sorted(asked - exported_names()) == []


def test_the_variables_choose_in_every_query(
    dashboard: dict[str, Any], expressions: list[str]
) -> None:
    chosen = {"SessionName": "$session", "instance": "$instance"}
    variables = {v["name"] for v in dashboard["templating"]["list"]}
    assert variables == {"datasource", "session", "instance"}
    for text in expressions:
        for selector in parsed(text):
            labels = {"SessionName"} if selector.name in OF_THE_CONTROLLER else LABELS
            matched = {matcher.name: matcher.value for matcher in selector.matchers.matchers}
            assert {name: matched.get(name) for name in LABELS} == {
                name: chosen[name] if name in labels else None for name in LABELS
            }


def test_counters_are_looked_at_by_rate(expressions: list[str]) -> None:
    for text in expressions:
        for name in re.findall(r"(?<!rate\()(?<!increase\()\bray_\w+(?=[{])", text):
            assert not name.endswith(("_total", "_bucket", "_count")), text
