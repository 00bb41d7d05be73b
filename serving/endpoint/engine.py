"""Ray's vLLM engine, started without what a checkpoint on a local disk does not need."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.platforms import current_platform


class LocalCheckpoint(CallbackBase):
    """`LLMConfig.callback_config`: no task on every node to download what is there."""

    async def on_before_node_init(self) -> None:
        """Called by Ray before it would download the model."""
        self.ctx.run_init_node = False


class GemEngine(VLLMEngine):
    """`VLLMEngine` without a worker process of its own where one process is enough.

    On a CPU Ray sets the multi-process executor, whatever is asked for: a replica would be three
    processes that each import vLLM, and pass every step through shared memory.
    """

    def _start_async_llm_engine(self, engine_args: Any, config: Any, placement_group: Any) -> Any:
        parallel = config.parallel_config
        if current_platform.is_cpu() and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        return super()._start_async_llm_engine(engine_args, config, placement_group)
