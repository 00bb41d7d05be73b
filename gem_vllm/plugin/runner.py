"""Embedding requests in the batches of vLLM's V1 model runner (`runner_v2` has the V2 runner's).

vLLM takes this runner where there is no Triton, and where it is asked for what V2 has not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.distributed import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.batch import Embeddings
from gem_vllm.plugin.embeddings_output import EmbeddingsOutput
from gem_vllm.plugin.runner_mixin import GemRunner

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as _Runner
else:
    _Runner = object


class GemModelRunner(GemRunner, _Runner):
    """Mixin over vLLM's V1 runners; `enable` puts it in front of an existing runner."""

    gem_drafter = "drafter"

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's, with room for what the rank before sends, where there is one.

        vLLM makes it in a dummy run, of which an eager engine on a CPU has none.
        """
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.dtype, device=self.device
            )

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        self.gem_batch.finish(scheduler_output.finished_req_ids)
        self.gem_batch.add(scheduler_output.scheduled_new_reqs)
        return super()._update_states(scheduler_output)

    def _prepare_inputs(
        self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray
    ) -> Any:
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        batch, num_reqs = self.input_batch, len(num_scheduled_tokens)
        drafts = scheduler_output.scheduled_spec_decode_tokens
        plan = self.gem_batch.begin(
            self.get_model(),  # not what wraps it for CUDA graphs
            batch.req_ids[:num_reqs],
            batch.num_computed_tokens_cpu[:num_reqs],
            num_scheduled_tokens,
            num_drafts=np.array([len(drafts.get(req_id, ())) for req_id in batch.req_ids])
            if drafts
            else None,
            all_rows_are_read=bool(self.num_prompt_logprobs) or self.gem_drafts_from_rows,
            loras=self.lora_config is not None,
        )
        if len(plan.embedding):
            self.discard_request_mask.np[plan.embedding] = True
            self.discard_request_mask.copy_to_gpu(batch.num_reqs)
        # Slots, which count the padding, are set by now.
        shift = self.gem_batch.position_shift()
        if shift is not None:
            self.positions[: len(shift)] -= shift
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
            kwargs["force_eager"] = kwargs.get("force_eager", False) or len(step.rows_np) > 0
            kwargs["force_uniform_decode"] = False
        return super()._determine_batch_execution_and_padding(*args, **kwargs)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample for the generating rows, pool for the finished embedding rows."""
        state = self.execute_model_state
        embeddings = [] if state is None else self.gem_batch.embed(state.hidden_states)
        if state is not None and self.speculative_config is not None:
            shift = self.gem_batch.position_shift()
            if shift is not None:
                # To a draft model a position is how far its request has come, padding included:
                # its slots are counted from there.
                self.positions[: len(shift)] += shift
        output = super().sample_tokens(grammar_output)
        if not embeddings:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return EmbeddingsOutput(
                output, embeddings, torch.cuda.current_stream(), self.async_output_copy_stream
            )
        assert isinstance(output, ModelRunnerOutput)
        on_cpu = [replace(part, values=part.values.cpu()) for part in embeddings]
        output.pooler_output = Embeddings.in_order(on_cpu, output.req_ids)
        return output
