"""Embedding requests in the batches of vLLM's V2 model runner, which is the default on CUDA.

Nothing here waits for the GPU: what a step is, is planned on the CPU from what the scheduler says,
and embeddings are copied to the CPU beside the sampled tokens, while the next step runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.embeddings_output import EmbeddingsOutput
from gem_vllm.plugin.runner_mixin import GemRunner


class GemModelRunnerV2(GemRunner, GPUModelRunner):
    """Mixin over vLLM's V2 runners; `enable` puts it in front of an existing runner."""

    gem_drafter = "speculator"

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; logits of a draft are kept as wide as those they are compared with."""
        super().load_model(*args, **kwargs)
        draft_logits = getattr(self.speculator, "draft_logits", None)
        if draft_logits is not None:
            missing = self.model_config.get_vocab_size() - draft_logits.shape[-1]
            self.speculator.draft_logits = nn.functional.pad(draft_logits, (0, missing))

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; then graphs are chosen by what a step is."""
        super().initialize_kv_cache(*args, **kwargs)
        self.cudagraph_manager.__class__ = GemCudaGraphManager

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM's; what is collected of preempted requests stays."""
        self.gem_batch.finish(scheduler_output.finished_req_ids)
        super().finish_requests(scheduler_output)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM's, with embedding requests as requests that sample a token."""
        self.gem_batch.add(scheduler_output.scheduled_new_reqs)
        super().add_requests(scheduler_output)

    def gather_batch_req_state(
        self, scheduler_output: SchedulerOutput, dummy_run: bool
    ) -> tuple[Any, int | None]:
        """vLLM's state of the batch; the step is planned from it."""
        state, uniform_token_count = super().gather_batch_req_state(scheduler_output, dummy_run)
        if state is None:
            return state, uniform_token_count
        prompt_logprobs = self.prompt_logprobs_worker
        plan = self.gem_batch.begin(
            self.model,
            state.req_ids,
            self.req_states.num_computed_tokens_np[state.idx_mapping_np],
            state.num_scheduled_tokens,
            num_drafts=state.num_draft_tokens_np,
            all_rows_are_read=self.gem_drafts_from_rows
            or (
                prompt_logprobs is not None
                and (
                    bool(prompt_logprobs.uses_prompt_logprobs[state.idx_mapping_np].any())
                    or bool(prompt_logprobs.token_id_scores)
                )
            ),
            loras=self.lora_config is not None,
        )
        if plan.step is None:
            return state, uniform_token_count
        # A drafting head, which attends as the target does, chooses its graphs by itself: a full
        # one would read what attention has planned for another step.
        return state._replace(decode_graph_eligible=False), None

    def prepare_attn(self, input_batch: InputBatch) -> Any:
        """vLLM's; positions count up as if there were no padding, slots count it."""
        prepared = super().prepare_attn(input_batch)
        shift = self.gem_batch.position_shift()
        if shift is not None:
            input_batch.positions[: len(shift)] -= shift
        return prepared

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        """Sample for the generating rows, pool for the finished embedding rows."""
        state = self.execute_model_state
        if state is None or state.hidden_states is None:
            return super().sample_tokens(grammar_output)
        shift = self.gem_batch.position_shift()
        if shift is not None:
            # To the sampler a position is how far its request has come, padding included.
            state.input_batch.positions[: len(shift)] += shift
        embeddings = self.gem_batch.embed(state.hidden_states)
        output = super().sample_tokens(grammar_output)
        if embeddings:
            output = EmbeddingsOutput(output, embeddings, self.main_stream, self.output_copy_stream)
        return output

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
        """vLLM's, where embedding rows get no token; a step of nothing else needs no sampler."""
        plan = self.gem_batch.plan
        assert plan is not None
        if len(plan.embedding) == input_batch.num_reqs:
            self.model.logits_rows = None
            return _nothing_sampled(input_batch.num_reqs, self.device)
        output, num_sampled, num_rejected = super().sample(
            hidden_states, input_batch, grammar_output
        )
        if len(plan.embedding):
            num_sampled.index_fill_(0, async_tensor_h2d(plan.embedding, self.device), 0)
        return output, num_sampled, num_rejected


def _nothing_sampled(
    num_reqs: int, device: torch.device
) -> tuple[SamplerOutput, torch.Tensor, torch.Tensor]:
    """What `sample` gives where no request gets a token."""
    none = torch.zeros(num_reqs, dtype=torch.int32, device=device)
    output = SamplerOutput(
        sampled_token_ids=torch.zeros(num_reqs, 1, dtype=torch.int64, device=device),
        logprobs_tensors=None,
        num_nans=None,
        num_sampled=none,
        num_rejected=none,
    )
    return output, none, none


class GemCudaGraphManager(ModelCudaGraphManager):
    """vLLM's, which chooses among the graphs that compute what a step is.

    Graphs are captured without special tokens, whose number changes from step to step: a step that
    has any runs without. Where sequences go on behind a run, the graph is one that leaves attention
    out (piecewise), as their block tables are not those of the batch. A step of neither kind, such
    as ordinary decoding, has all graphs that vLLM has.
    """

    def dispatch(
        self,
        num_reqs: int,
        num_tokens: int,
        uniform_token_count: int | None,
        num_active_loras: int,
        max_query_len: int | None = None,
        **kwargs: Any,
    ) -> BatchExecutionDescriptor:
        """vLLM's choice for a step; arguments as there."""
        step = gem_step.current()
        if step is not None and len(step.rows_np):
            return BatchExecutionDescriptor(
                cg_mode=CUDAGraphMode.NONE,
                num_tokens=num_tokens,
                num_reqs=num_reqs,
                num_active_loras=num_active_loras,
            )
        if step is not None:
            uniform_token_count = max_query_len = None
        return super().dispatch(
            num_reqs,
            num_tokens,
            uniform_token_count,
            num_active_loras,
            max_query_len=max_query_len,
            **kwargs,
        )
