"""What a GEM model runner knows of its requests beside vLLM, whichever of vLLM's runners it is.

A batch row of an embedding request is an ordinary greedy row whose sampled token is thrown away, as
that of an unfinished prefill is. So all of vLLM's bookkeeping of the batch stays valid. The hidden
states of its special tokens are collected from the forward pass, over several steps where they
straddle two chunks of the prompt.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.core.sched.output import NewRequestData

from gem_vllm.config import GemConfig
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.last_layer import ReadRows
from gem_vllm.plugin.pooler import pool_special_tokens
from gem_vllm.plugin.runs import Run, find_runs

_DISCARDED = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)


@dataclass(frozen=True)
class Plan:
    """A step's requests.

    Attributes:
        req_ids: of the batch, in its order.
        embedding: int64 [n]: batch rows of embedding requests.
        finished: request ids of those whose prompt ends with this step.
        step: their special tokens, and those inside prompts; None for none.
    """

    req_ids: Sequence[str]
    embedding: gem_step.IntArray
    finished: Sequence[str]
    step: gem_step.GemStep | None


@dataclass(frozen=True)
class Embeddings:
    """Those of requests that ask for them alike.

    Attributes:
        request_ids: n of them.
        values: float32 [n, size].
    """

    request_ids: Sequence[str]
    values: torch.Tensor

    @staticmethod
    def in_order(parts: Iterable[Embeddings], req_ids: Iterable[str]) -> list[torch.Tensor | None]:
        """The embedding of each request, None for those without: vLLM's `pooler_output`.

        Args:
            parts: on the CPU.
            req_ids: of the batch.
        """
        found = {
            request_id: value
            for part in parts
            for request_id, value in zip(part.request_ids, part.values.unbind(), strict=True)
        }
        return [found.get(request_id) for request_id in req_ids]


class GemBatch:
    """The requests of a runner.

    Args:
        gem_config: the checkpoint's.
        device: the model's.

    Attributes:
        runs: request id to the runs of its sequence, for requests that have any.
        pooling_params: request id to those of an embedding request.
        partial_states: request id to the hidden states [k, hidden] of its special tokens, where
            they are computed in more than one step.
        plan: of the step that runs, until its tokens are sampled; None before the first.
    """

    def __init__(self, gem_config: GemConfig, device: torch.device) -> None:
        self.gem_config = gem_config
        self.device = device
        self.runs: dict[str, tuple[Run, ...]] = {}
        self.pooling_params: dict[str, PoolingParams] = {}
        self.partial_states: dict[str, torch.Tensor] = {}
        self.plan: Plan | None = None

    def add(self, new_requests: list[NewRequestData]) -> None:
        """Note what is new; embedding requests among them become ones that sample a token.

        A request may come again, when it goes on after it was preempted.
        """
        for request in new_requests:
            if request.pooling_params is not None:
                request.sampling_params = _DISCARDED
                self.pooling_params[request.req_id] = request.pooling_params
            if runs := find_runs(request.prompt_token_ids or (), self.gem_config.special_token_ids):
                self.runs[request.req_id] = runs

    def finish(self, request_ids: Iterable[str]) -> None:
        """Forget requests."""
        for request_id in request_ids:
            self.runs.pop(request_id, None)
            self.pooling_params.pop(request_id, None)
            self.partial_states.pop(request_id, None)

    def begin(
        self,
        model: Any,
        req_ids: Sequence[str],
        num_computed: gem_step.IntArray,
        num_scheduled: gem_step.IntArray,
        *,
        num_drafts: gem_step.IntArray | None,
        all_rows_are_read: bool,
        loras: bool,
    ) -> Plan:
        """Plan a step and publish it to the attention, the adapter and the model.

        Args:
            model: a `GemCausalLM`.
            req_ids: of the batch, in its order.
            num_computed: int [requests]: tokens computed before this step; behind the prompt it may
                be more, as long as it is not known which speculated tokens are accepted.
            num_scheduled: int [requests]: tokens computed in this step.
            num_drafts: int [requests]: how many of those are speculated; None for none of any.
            all_rows_are_read: whether more is read than embeddings and rows to sample from.
            loras: whether ordinary LoRAs are served, which count on the rows of all requests.
        """
        embedding = [i for i, req_id in enumerate(req_ids) if req_id in self.pooling_params]
        end = num_computed + num_scheduled
        step = gem_step.GemStep.of_batch(
            {i: self.runs[req_id] for i, req_id in enumerate(req_ids) if req_id in self.runs},
            set(embedding),
            num_computed,
            num_scheduled,
            self.device,
        )
        self.plan = Plan(
            req_ids=req_ids,
            embedding=np.array(embedding, dtype=np.int64),
            finished=[req_ids[i] for i in embedding if self.runs[req_ids[i]][-1].end <= end[i]],
            step=step,
        )
        gem_step.publish(step)
        num_sampled = len(num_scheduled) + (0 if num_drafts is None else int(num_drafts.sum()))
        few_are_read = not all_rows_are_read and 2 * num_sampled <= num_scheduled.sum()
        some_without_logits = bool(embedding) and not loras
        logits_rows = read_rows = None
        if some_without_logits or few_are_read:
            sampled, request_of_sampled = _rows_to_sample_from(num_scheduled, num_drafts)
            if some_without_logits:
                generating = np.isin(request_of_sampled, embedding, invert=True).nonzero()[0]
                logits_rows = async_tensor_h2d(generating, self.device)
            if few_are_read and model.last_mlp is not None:
                read_rows = ReadRows.of_step(step, sampled, self.device)
        model.logits_rows = logits_rows
        if model.last_mlp is not None:
            model.last_mlp.read_rows = read_rows
        return self.plan

    def end_forward(self, model: Any) -> None:
        """The model has run, and a dummy run that follows is of no step."""
        gem_step.publish(None)
        if model.last_mlp is not None:
            model.last_mlp.read_rows = None

    def position_shift(self) -> torch.Tensor | None:
        """int64 [tokens]: padding before each token of the step; None for none."""
        step = None if self.plan is None else self.plan.step
        if step is None or step.position_shift is None:
            return None
        return async_tensor_h2d(step.position_shift, self.device)

    def embed(self, hidden_states: torch.Tensor) -> list[Embeddings]:
        """The embeddings of those requests that the step ends.

        Args:
            hidden_states: [tokens, hidden], after the final norm.
        """
        plan = self.plan
        if plan is None or plan.step is None:
            return []
        states = self._states_of_finished(plan, plan.step, hidden_states)
        alike = defaultdict(list)
        for index, request_id in enumerate(plan.finished):
            params = self.pooling_params[request_id]
            alike[params.dimensions, params.use_activation].append(index)
        return [
            Embeddings(
                [plan.finished[index] for index in indices],
                pool_special_tokens(
                    states
                    if len(alike) == 1
                    else states.index_select(0, async_tensor_h2d(np.array(indices), self.device)),
                    self.gem_config,
                    dimensions=dimensions,
                    use_activation=use_activation,
                ),
            )
            for (dimensions, use_activation), indices in alike.items()
        ]

    def _states_of_finished(
        self, plan: Plan, step: gem_step.GemStep, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """[n, k, hidden] of the n requests whose special tokens are all computed.

        Of other embedding requests, what there is is kept.
        """
        k = self.gem_config.k
        read = hidden_states[step.rows[: step.num_read]]
        request_index = step.request_index[: step.num_read]
        special_index = step.special_index[: step.num_read]
        if _are_whole_runs(request_index, special_index, k):
            return read.unflatten(0, (-1, k))
        states: dict[str, torch.Tensor] = {}
        begin = 0
        while begin < step.num_read:
            request, first = request_index[begin], int(special_index[begin])
            request_id = plan.req_ids[request]
            n = int((request_index[begin : begin + k - first] == request).sum())
            its_states = read[begin : begin + n]
            if n < k:
                partial = self.partial_states.setdefault(
                    request_id, read.new_zeros(k, read.shape[1])
                )
                partial[first : first + n] = its_states
                its_states = partial
            states[request_id] = its_states
            begin += n
        if not plan.finished:
            return read.new_empty(0, k, read.shape[1])
        return torch.stack([states[request_id] for request_id in plan.finished])


def _are_whole_runs(
    request_index: gem_step.IntArray, special_index: gem_step.IntArray, k: int
) -> bool:
    """Whether special tokens, in order, are k of one request, k of another, and so on."""
    if len(request_index) % k:
        return False
    by_run = request_index.reshape(-1, k)
    return bool(
        (by_run == by_run[:, :1]).all() and (special_index.reshape(-1, k) == np.arange(k)).all()
    )


def _rows_to_sample_from(
    num_scheduled: gem_step.IntArray, num_drafts: gem_step.IntArray | None
) -> tuple[gem_step.IntArray, gem_step.IntArray]:
    """Rows among the step's tokens, in batch order, and the request that each belongs to.

    Args:
        num_scheduled: int [requests]: tokens computed in the step.
        num_drafts: int [requests]: how many of those are speculated, each request's last; None for
            none. A token is sampled behind each of them, and behind the one before.
    """
    counts = np.ones_like(num_scheduled) if num_drafts is None else 1 + num_drafts
    request = np.repeat(np.arange(len(counts)), counts)
    rows = (np.cumsum(num_scheduled) - np.cumsum(counts))[request] + np.arange(len(request))
    return rows, request
