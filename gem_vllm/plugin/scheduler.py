"""vLLM's scheduler, with the special tokens behind embedding prompts and counts of step kinds.

The special tokens are added here, behind the front end: what the server reports to the user
(`usage`, `prompt_token_ids`) is the user's own prompt.
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
from gem_vllm.plugin.metrics import attach_step_counts


class GemScheduler(AsyncScheduler):
    """`AsyncScheduler` also serves synchronous engines: its placeholders are settled each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gem_config = GemConfig.from_hf_config(self.vllm_config.model_config.hf_config)
        self._step_counts: Counter[str] = Counter()

    def add_request(self, request: Request) -> None:
        """Queue `request`; behind an embedding request's prompt go the special tokens."""
        if request.pooling_params is not None:
            append_special_tokens(request, self.gem_config.appended_ids, self.hash_block_size)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step and count it as `embed`, `generate` or `mixed`."""
        output = super().schedule(*args, **kwargs)
        kinds = {
            self.requests[request_id].pooling_params is not None
            for request_id in output.num_scheduled_tokens
        }
        if kinds:
            self._step_counts[
                "mixed" if len(kinds) == 2 else "embed" if True in kinds else "generate"
            ] += 1
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with the counts since the last call."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            attach_step_counts(stats, self._step_counts)
            self._step_counts.clear()
        return stats


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
