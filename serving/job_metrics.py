"""A replica's work as Ray's own metrics: in its dashboard, and at every node's Prometheus port.

Ray exports them with its prefix, as `ray_gem_job_rows_total` and so on. They count what was done: a
shard that is done again after a kill is counted again. The job's counts are in its summary.
"""

from __future__ import annotations

from ray.util.metrics import Counter

DESCRIPTIONS = {
    "rows": "Rows read by gem-vllm embed, bad ones included.",
    "embedded": "Rows embedded by gem-vllm embed.",
    "tokens": "Tokens of prompts and answers of gem-vllm embed.",
}


class JobMetrics:
    """Counters of one process.

    Args:
        output: the job's, by which its counters are told from another's.
    """

    def __init__(self, output: str) -> None:
        self._counters = {
            name: Counter(f"gem_job_{name}_total", text, tag_keys=("output",))
            for name, text in DESCRIPTIONS.items()
        }
        self._tags = {"output": output}

    def add(self, **amounts: int) -> None:
        """Count more of what `DESCRIPTIONS` names."""
        for name, amount in amounts.items():
            if amount:  # Ray refuses to add nothing
                self._counters[name].inc(amount, self._tags)
