"""Embedding requests in the batches of vLLM's V1 model runner.

A batch row of an embedding request is an ordinary greedy row whose sampled token is thrown away,
by the same mask that throws away what unfinished prefills sample. So all bookkeeping of the batch
stays valid. The hidden states of its special tokens are collected between `execute_model` and
`sample_tokens`, over several steps where the special tokens straddle two chunks.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from gem_vllm.config import GemConfig
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.frames import with_room
from gem_vllm.plugin.pooler import pool_special_tokens
from gem_vllm.plugin.runs import Run, find_runs

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object

_DISCARDED = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)


class GemModelRunner(_Runner):
    """Mixin over vLLM's V1 runners; `enable` puts it in front of an existing runner."""

    gem_config: GemConfig
    _gem_step: gem_step.GemStep | None
    # Request id to the runs of its sequence, for requests that have any.
    _runs: dict[str, tuple[Run, ...]]
    # Request id to the hidden states [hidden] of its special tokens that are computed, by index.
    _special_states: dict[str, dict[int, torch.Tensor]]
    _finished_embeddings: list[int]

    @staticmethod
    def enable(runner: Any, gem_config: GemConfig) -> None:
        """Make `runner`, fresh from vLLM's worker, serve embedding requests too."""
        runner.__class__ = type(f"Gem{type(runner).__name__}", (GemModelRunner, type(runner)), {})
        runner.gem_config = gem_config
        runner._gem_step = None
        runner._runs = {}
        runner._special_states = {}
        runner._finished_embeddings = []

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, with room for what the rank before sends, where there is one.

        vLLM makes it in a dummy run, of which an eager engine on a CPU has none.
        """
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

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
                longer = spec.sliding_window + spec.block_size + self.gem_config.k
                specs[name] = replace(spec, sliding_window=longer)
        return specs

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass; the step's special tokens are known only while it runs."""
        try:
            return with_room(super().execute_model, *args, **kwargs)
        finally:
            gem_step.publish(None)
            if self.model.last_mlp is not None:
                self.model.last_mlp.read_rows = None

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        for request_id in scheduler_output.finished_req_ids:
            self._special_states.pop(request_id, None)
            self._runs.pop(request_id, None)
        new_requests = scheduler_output.scheduled_new_reqs
        for i, request in enumerate(new_requests):
            if request.pooling_params is not None:
                new_requests[i] = replace(request, sampling_params=_DISCARDED)
                self._special_states[request.req_id] = {}
            if runs := find_runs(request.prompt_token_ids, self.gem_config.special_token_ids):
                self._runs[request.req_id] = runs
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch = self.input_batch
        embedding = [
            i for i, request_id in enumerate(batch.req_ids) if request_id in self._special_states
        ]
        unfinished = self.discard_request_mask.np
        self._finished_embeddings = [i for i in embedding if not unfinished[i]]
        self.model.logits_rows = None
        if embedding:
            unfinished[embedding] = True
            self.discard_request_mask.copy_to_gpu(batch.num_reqs)
            if self.lora_config is None:  # a LoRA counts on the rows of all requests
                generating = np.setdiff1d(np.arange(batch.num_reqs), embedding)
                self.model.logits_rows = torch.from_numpy(generating).to(self.device)
        self._gem_step = gem_step.GemStep.of_batch(
            {
                i: self._runs[req_id]
                for i, req_id in enumerate(batch.req_ids)
                if req_id in self._runs
            },
            set(embedding),
            batch.num_computed_tokens_cpu,
            num_scheduled_tokens,
            self.device,
        )
        gem_step.publish(self._gem_step)
        self._leave_padding_out_of_positions(scheduler_output.total_num_scheduled_tokens)
        if self.model.last_mlp is not None:
            self.model.last_mlp.read_rows = self._read_rows(
                prepared[0], scheduler_output.total_num_scheduled_tokens
            )
        return prepared

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's choice of a CUDA graph, of those that compute what this step is.

        Graphs are captured without special tokens, whose number changes from step to step: a step
        that has any runs without. Where sequences go on behind a run, the graph is one that leaves
        attention out (piecewise), as their block tables are not those of the batch. A step of
        neither kind, such as ordinary decoding, has all graphs that vLLM has.
        """
        step = gem_step.current()
        if step is not None:
            kwargs["force_eager"] = kwargs.get("force_eager", False) or len(step.rows) > 0
            kwargs["force_uniform_decode"] = False
            kwargs["allow_microbatching"] = False
        return super()._determine_batch_execution_and_padding(*args, **kwargs)

    def _leave_padding_out_of_positions(self, num_tokens: int) -> None:
        """Positions count up as if there were no padding; slots, which are set by now, count it."""
        if self._gem_step is not None and self._gem_step.position_shift is not None:
            shift = torch.from_numpy(self._gem_step.position_shift)
            self.positions[:num_tokens] -= shift.to(self.device, non_blocking=True)

    def _read_rows(self, logits_indices: torch.Tensor, num_tokens: int) -> torch.Tensor | None:
        """Rows of the last layer that are read: embeddings' special tokens, rows to sample from.

        None for all, where most are read, or may be: prompt logprobs read a whole prompt.
        """
        if self.num_prompt_logprobs or 2 * len(logits_indices) > num_tokens:
            return None
        sampled = logits_indices.long()
        if self._gem_step is None:
            return sampled
        special = self._gem_step.rows[: self._gem_step.num_read]
        return torch.cat([special, sampled[~torch.isin(sampled, special)]])

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample for the generating rows, pool for the finished embedding rows."""
        state = self.execute_model_state
        embeddings = {} if state is None else self._embed(state.hidden_states)
        output = super().sample_tokens(grammar_output)
        if embeddings:
            result = output
            if isinstance(output, AsyncModelRunnerOutput):
                result = output._model_runner_output
            assert isinstance(result, ModelRunnerOutput)
            result.pooler_output = [embeddings.get(request_id) for request_id in result.req_ids]
        return output

    def _embed(self, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Collect this step's special tokens; request id to embedding for those now complete.

        Args:
            hidden_states: [tokens, hidden], after the final norm.
        """
        step, self._gem_step = self._gem_step, None
        req_ids = self.input_batch.req_ids
        if step is not None:
            states = hidden_states[step.rows[: step.num_read]].float().cpu()
            for n, state in enumerate(states):
                request_id = req_ids[step.request_index[n]]
                self._special_states[request_id][int(step.special_index[n])] = state
        alike = defaultdict(list)
        for i in self._finished_embeddings:
            params = self.requests[req_ids[i]].pooling_params
            assert params is not None
            alike[params.dimensions, params.use_activation].append(req_ids[i])
        embeddings: dict[str, torch.Tensor] = {}
        for (dimensions, use_activation), request_ids in alike.items():
            special = torch.stack(
                [
                    self._special_states[request_id][j]
                    for request_id in request_ids
                    for j in range(self.gem_config.k)
                ]
            )
            pooled = pool_special_tokens(
                special.unflatten(0, (-1, self.gem_config.k)),
                self.gem_config,
                dimensions=dimensions,
                use_activation=use_activation,
            )
            embeddings.update(zip(request_ids, pooled, strict=True))
        self._finished_embeddings = []
        return embeddings
