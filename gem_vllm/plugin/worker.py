"""vLLM's worker for the platform at hand, with a runner that serves embedding requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms import current_platform

from gem_vllm.config import GemConfig

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as _Worker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker


class GemWorker(_Worker):
    """Set as `parallel_config.worker_cls` for GEM checkpoints."""

    def init_device(self) -> None:
        """Let vLLM build its runner, then add the embedding side to it."""
        super().init_device()
        gem_config = GemConfig.from_hf_config(self.model_config.hf_config)
        # On first use: either brings one of vLLM's runners with it.
        if self.vllm_config.use_v2_model_runner:
            from gem_vllm.plugin.runner_v2 import GemModelRunnerV2

            GemModelRunnerV2.enable(self.model_runner, gem_config)
        else:
            from gem_vllm.plugin.runner import GemModelRunner

            GemModelRunner.enable(self.model_runner, gem_config)
