"""Step kinds, from the scheduler to Prometheus: `gem_steps_total{kind="embed|generate|mixed"}`.

Scheduler and `/metrics` live in two processes. What travels between them is vLLM's
`SchedulerStats`; its one open table of integers, `num_kv_fetch_reqs_by_stage`, carries the counts,
and the stat logger below (entry point `vllm.stat_logger_plugins`) takes them out again.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import REGISTRY, Counter
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

STEP_KINDS = ("embed", "generate", "mixed")
# vLLM unregisters every collector with "vllm" in its name when an engine starts.
STEPS_METRIC = "gem_steps"
_KEY = "gem_steps:"


def attach_step_counts(stats: SchedulerStats, counts: Mapping[str, int]) -> None:
    """Put `counts` (step kind to number of steps) into `stats`."""
    for kind, count in counts.items():
        stats.num_kv_fetch_reqs_by_stage[_KEY + kind] = count


def take_step_counts(stats: SchedulerStats) -> dict[str, int]:
    """Remove the counts from `stats` and return them; empty for an engine without GEM."""
    table = stats.num_kv_fetch_reqs_by_stage
    return {kind: table.pop(_KEY + kind) for kind in STEP_KINDS if _KEY + kind in table}


def _steps_counter() -> Counter:
    registered = REGISTRY._names_to_collectors.get(STEPS_METRIC)
    if isinstance(registered, Counter):
        return registered
    return Counter(
        STEPS_METRIC,
        "Engine steps by kind of the requests in them: embed-only, generate-only or mixed.",
        ["kind", "engine"],
    )


class GemStatLogger(StatLoggerBase):
    """Counts the step kinds of one engine."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0) -> None:
        self._engine = str(engine_index)
        self._counter = _steps_counter()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """Add one step's counts."""
        if scheduler_stats is not None:
            for kind, count in take_step_counts(scheduler_stats).items():
                self._counter.labels(kind=kind, engine=self._engine).inc(count)

    def log_engine_initialized(self) -> None:
        """Show the three kinds from the start, at zero."""
        for kind in STEP_KINDS:
            self._counter.labels(kind=kind, engine=self._engine)
