"""vLLM's scheduler, with the special tokens behind embedding prompts and counts of step kinds.

The special tokens, and the padding before runs inside a prompt, are added here, behind the front
end: what the server reports to the user (`usage`, `prompt_token_ids`) is the user's own prompt.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request

from gem_vllm.config import GemConfig
from gem_vllm.plugin.config import TOKENS_BESIDE_CHAT
from gem_vllm.plugin.metrics import attach_step_counts
from gem_vllm.plugin.runs import Run, find_runs, pad_runs


class GemScheduler(AsyncScheduler):
    """For engines that schedule asynchronously, and for those that do not."""

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gem_config = GemConfig.from_hf_config(self.vllm_config.model_config.hf_config)
        self._step_counts: Counter[str] = Counter()
        self._tokens_beside_chat: int | None = self.vllm_config.additional_config.get(
            TOKENS_BESIDE_CHAT
        )
        self._tokens_of_a_step = self.max_num_scheduled_tokens
        # Request id to the runs inside its prompt, for requests that have any.
        self._runs: dict[str, tuple[Run, ...]] = {}

    def add_request(self, request: Request) -> None:
        """Queue `request`, with padding before the runs in its prompt.

        Behind an embedding request's prompt go the special tokens.
        """
        special_ids = self.gem_config.special_token_ids
        if not set(special_ids).isdisjoint(request.prompt_token_ids or ()):
            pad_prompt(request, special_ids, self.block_size)
            self._runs[request.request_id] = find_runs(request.prompt_token_ids, special_ids)
        if request.pooling_params is not None:
            append_special_tokens(request, self.gem_config.appended_ids, self.hash_block_size)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step and count it as `embed`, `generate` or `mixed`."""
        self._free_what_runs_hide()
        if self._tokens_beside_chat is not None:
            self._leave_room_for_chat(self._tokens_beside_chat)
        output = super().schedule(*args, **kwargs)
        for new in output.scheduled_new_reqs:
            request = self.requests[new.req_id]
            # With the V2 runner the preempted are among these: they are counted already.
            if new.req_id in self._runs and not request.num_preemptions:
                _count_without_padding(request, self._runs[new.req_id])
        kinds = {
            self.requests[request_id].pooling_params is not None
            for request_id in output.num_scheduled_tokens
        }
        if kinds:
            self._step_counts[
                "mixed" if len(kinds) == 2 else "embed" if True in kinds else "generate"
            ] += 1
        return output

    def _leave_room_for_chat(self, tokens: int) -> None:
        """Let a step with requests that are being answered have few other tokens.

        How long such a step takes is how long each of those requests waits for its next token.

        Args:
            tokens: of prompts, to embed or to answer, that the step may have beside those.
        """
        waits = {
            request.request_id: 1 + len(request.spec_token_ids)
            for request in self.running
            if request.pooling_params is None and not _is_prompt_left(request)
        }
        # vLLM gives out a step's tokens in this order.
        self.running.sort(key=lambda request: request.request_id not in waits)
        budget = sum(waits.values()) + tokens if waits else self._tokens_of_a_step
        self.max_num_scheduled_tokens = min(budget, self._tokens_of_a_step)

    def _free_what_runs_hide(self) -> None:
        """Give back the KV blocks before a run that is computed: nothing to come sees them.

        As vLLM does behind a sliding window. Tokens of steps in flight do not count as computed.
        """
        for request_id in [*self._runs]:
            request = self.requests.get(request_id)
            if request is None:
                del self._runs[request_id]
                continue
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            hidden = max(
                (run.start for run in self._runs[request_id] if run.end <= computed), default=0
            )
            for manager in self.kv_cache_manager.coordinator.single_type_managers:
                manager._remove_blocks_in_range(request_id, 0, hidden // manager.block_size)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self.scheduler_config.async_scheduling:
            super()._update_after_schedule(scheduler_output)
        else:
            # No placeholder: a pipeline's next step would take it for a token to go on from.
            super(AsyncScheduler, self)._update_after_schedule(scheduler_output)

    def _update_request_with_output(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        if self.scheduler_config.async_scheduling:
            return super()._update_request_with_output(request, *args, **kwargs)
        return super(AsyncScheduler, self)._update_request_with_output(request, *args, **kwargs)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with the counts since the last call."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            attach_step_counts(stats, self._step_counts)
            self._step_counts.clear()
        return stats


def _is_prompt_left(request: Request) -> bool:
    """Whether some of a request's prompt is still to be computed."""
    return request.num_computed_tokens < request.num_prompt_tokens


def _count_without_padding(request: Request, runs: tuple[Run, ...]) -> None:
    """Have a request that was just begun report how much of the user's own prompt was cached."""
    stats = request.prefill_stats
    if stats is not None:
        cached = stats.num_local_cached_tokens
        stats.set(
            num_prompt_tokens=stats.num_prompt_tokens - sum(run.padding for run in runs),
            num_local_cached_tokens=cached
            - sum(max(0, min(run.start, cached) - run.seen_to) for run in runs),
            num_external_cached_tokens=stats.num_external_cached_tokens,
        )


def pad_prompt(request: Request, special_ids: tuple[int, ...], block_size: int) -> None:
    """Put padding before the runs in the prompt of a request that is not queued yet.

    Args:
        request: of any kind.
        special_ids: the k special tokens in their order.
        block_size: of the KV cache; where layers differ, what all of theirs divide.
    """
    assert request.prompt_token_ids is not None
    request.prompt_token_ids = pad_runs(request.prompt_token_ids, special_ids, block_size)
    request._all_token_ids[:] = request.prompt_token_ids
    request.num_prompt_tokens = len(request.prompt_token_ids)
    request.block_hashes.clear()
    request.update_block_hashes()


def append_special_tokens(
    request: Request, appended_ids: tuple[int, ...], hash_block_size: int
) -> None:
    """Put the special tokens behind the prompt of a request that is not queued yet.

    The KV blocks that hold what is appended get hashes of their own: a prefix-cache hit ends with
    the text, so that the special tokens' hidden states are always computed.

    Args:
        request: for an embedding.
        appended_ids: as `GemConfig.appended_ids`.
        hash_block_size: tokens of a block that has a hash.
    """
    assert request.prompt_token_ids is not None
    text_len = len(request.prompt_token_ids)
    # A new list: the front end of an in-process engine holds the same object.
    request.prompt_token_ids = [*request.prompt_token_ids, *appended_ids]
    request._all_token_ids.extend(appended_ids)
    request.num_prompt_tokens = len(request.prompt_token_ids)
    request.update_block_hashes()
    for i in range(text_len // hash_block_size, len(request.block_hashes)):
        request.block_hashes[i] = BlockHash(os.urandom(len(request.block_hashes[i])))
