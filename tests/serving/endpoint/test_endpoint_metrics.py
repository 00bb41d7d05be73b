"""Several exporters' metrics on one page."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from gem_vllm.serving.endpoint.metrics import merge

NODE = """\
# HELP ray_gem_requests_total Requests that were answered.
# TYPE ray_gem_requests_total counter
ray_gem_requests_total{{code="200",node="{node}"}} {count}
# HELP ray_gem_request_seconds Seconds.
# TYPE ray_gem_request_seconds histogram
ray_gem_request_seconds_bucket{{le="+Inf",node="{node}"}} {count}
ray_gem_request_seconds_count{{node="{node}"}} {count}
ray_gem_request_seconds_sum{{node="{node}"}} 1.5
# HELP ray_node_mem_used Of the node.
# TYPE ray_node_mem_used gauge
ray_node_mem_used 7
"""


def test_the_metrics_of_all_nodes_stand_below_one_header() -> None:
    page = merge([NODE.format(node="a", count=2), NODE.format(node="b", count=3)])
    families = {family.name: family for family in text_string_to_metric_families(page)}
    assert set(families) == {"ray_gem_requests", "ray_gem_request_seconds"}
    assert page.count("# TYPE ray_gem_requests_total counter") == 1
    assert [sample.value for sample in families["ray_gem_requests"].samples] == [2, 3]
    assert len(families["ray_gem_request_seconds"].samples) == 6


def test_of_no_exporters_there_is_an_empty_page() -> None:
    assert merge([]) == ""
