"""What both of vLLM's model runners are given alike; `runner` and `runner_v2` have what differs."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from gem_vllm.config import GemConfig
from gem_vllm.errors import GemError
from gem_vllm.plugin.batch import GemBatch
from gem_vllm.plugin.drafter import MODEL_METHODS, Drafter
from gem_vllm.plugin.frames import with_room

if TYPE_CHECKING:
    _Runner = Any
else:
    _Runner = object


class GemRunner(_Runner):
    """Mixin over vLLM's runners."""

    gem_batch: GemBatch
    # Name of vLLM's object that runs a draft model.
    gem_drafter: str
    # Whether tokens are drafted from the hidden states of every row.
    gem_drafts_from_rows = False

    @classmethod
    def enable(cls, runner: Any, gem_config: GemConfig) -> None:
        """Make `runner`, fresh from vLLM's worker, serve embedding requests too.

        Raises:
            GemError: it lacks what is overridden.
        """
        vllm_class = type(runner)
        missing = [
            name
            for mixin in (cls, GemRunner)
            for name, value in vars(mixin).items()
            if inspect.isfunction(value) and not hasattr(vllm_class, name)
        ]
        if missing:
            raise GemError(
                f"vLLM has moved under gem-vllm's model runner: {vllm_class.__name__} has no "
                f"{', '.join(missing)}. Install a vLLM version that this gem-vllm supports."
            )
        runner.__class__ = type(f"Gem{vllm_class.__name__}", (cls, vllm_class), {})
        runner.gem_batch = GemBatch(gem_config, runner.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; a draft model or head is told what the special tokens make of the vocabulary."""
        super().load_model(*args, **kwargs)
        speculative = self.vllm_config.speculative_config
        if speculative is None or speculative.method not in MODEL_METHODS:
            return
        self.gem_drafts_from_rows = speculative.use_eagle()
        drafter = getattr(self, self.gem_drafter, None)
        if drafter is not None:  # A pipeline has one on its last rank.
            # With CUDA graphs it may be wrapped.
            draft = getattr(drafter.model, "unwrap", lambda: drafter.model)()
            Drafter.enable(draft, self.vllm_config)

    def reload_weights(
        self,
        weights_iterator: Any = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """vLLM's; an adapter, and what the checkpoint says of its embeddings, stay as they are.

        Raises:
            ValueError: with ``weights_path``, where there is an adapter, or other special tokens.
        """
        if weights_path is not None:
            here, there = self.gem_batch.gem_config, GemConfig.from_pretrained(weights_path)
            if "adapter" in (here.train_mode, there.train_mode) or any(
                getattr(here, name) != getattr(there, name)
                for name in ("special_token_ids", "pooling", "instruction_ids")
            ):
                raise ValueError(
                    f"an adapter and special tokens are read at the start alone: for those of "
                    f"{weights_path}, start an engine with it"
                )
        super().reload_weights(weights_iterator, weights_path, is_checkpoint_format)

    def get_supported_tasks(self) -> tuple[Any, ...]:
        """vLLM's tasks for the model, and `embed`."""
        return (*super().get_supported_tasks(), "embed")

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's, with longer windows.

        A run's window counts neither its padding nor its tokens (`gem_vllm.mask`), so keys and
        values are kept for longer by as many. What is attended to is set by the layers.
        """
        specs = super().get_kv_cache_spec()
        for name, spec in specs.items():
            if isinstance(spec, SlidingWindowSpec):
                longer = spec.sliding_window + spec.block_size + self.gem_batch.gem_config.k
                specs[name] = replace(spec, sliding_window=longer)
        return specs

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass; the step's special tokens are known only while it runs."""
        try:
            return with_room(super().execute_model, *args, **kwargs)
        finally:
            self.gem_batch.end_forward(self.get_model())
