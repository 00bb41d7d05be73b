"""The GEM mask on vLLM's FlashAttention backend, which runs here over functions in plain torch.

All but those functions is what runs on CUDA: vLLM's metadata builder and implementation, and ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from gem_vllm.config import GemConfig
from gem_vllm.plugin.config import take_attention_backend
from gem_vllm.plugin.flash_attention import GemFlashAttentionImpl, with_own_key
from gem_vllm.reference import ReferenceEmbedder
from tests.plugin import flash_attention as in_torch
from tests.plugin.conftest import (
    attending_by,
    cosines,
    embed,
    free_blocks,
    random_prompts,
    running_engine,
)
from tests.plugin.mixed_load import MixedLoad, with_runs
from tests.tiny import WINDOWED


@pytest.fixture
def on_flash_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that are loaded from here on attend by FlashAttention."""
    for name in ("flash_attn_varlen_func", "reshape_and_cache_flash"):
        monkeypatch.setattr(flash_attn, name, getattr(in_torch, name), raising=False)
    monkeypatch.setattr(flash_attn, "get_flash_attn_version", lambda **options: 2)
    with attending_by(f"{in_torch.__name__}.FlashAttentionOnCPU"):
        yield


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_own_key_is_one_key_more(kv_heads: int, softcap: float) -> None:
    random = torch.Generator().manual_seed(0)
    n, heads, d, others, scale = 5, 4, 8, 7, 0.7
    query = torch.randn(n, heads, d, generator=random)
    key, value = torch.randn(2, n, others + 1, kv_heads, d, generator=random)

    def attend(keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        group = heads // kv_heads
        k, v = (x[:, :keys].repeat_interleave(group, dim=2) for x in (key, value))
        scores = torch.einsum("nhd,nkhd->nhk", query, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        return torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), v), scores.logsumexp(-1)

    attended, lse = attend(others)
    found = with_own_key(
        attended, lse.T, query, key[:, -1], value[:, -1], scale=scale, softcap=softcap
    )
    torch.testing.assert_close(found, attend(others + 1)[0])


def test_a_key_that_outweighs_all_others_does_not_overflow() -> None:
    one = torch.ones(1, 1, 4, dtype=torch.bfloat16)
    for lse, expected in ((-3e4, 2.0), (3e4, 1.0), (-torch.inf, 2.0)):
        found = with_own_key(one, torch.tensor([[lse]]), one, one, 2 * one, scale=1.0)
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [[[expected] * 4]]


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("attention_config", {"backend": AttentionBackendEnum.TRITON_ATTN}, "not on TRITON_ATTN"),
        ("attention_config", {"backend_per_kind": {"full": "FLASH_ATTN"}}, "one attention backend"),
        ("cache_config", {"cache_dtype": "fp8"}, "is not quantized"),
        ("parallel_config", {"decode_context_parallel_size": 2}, "context parallelism"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "context parallelism"),
    ],
)
def test_what_it_cannot_do_is_refused_at_start(
    part: str, options: dict[str, Any], message: str
) -> None:
    config = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None, backend_per_kind={}),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
    )
    take_attention_backend(config)
    assert config.attention_config.backend is AttentionBackendEnum.FLASH_ATTN
    vars(getattr(config, part)).update(options)
    with pytest.raises(ValueError, match=message):
        take_attention_backend(config)


# A base with attention over all, one with sliding windows, one with both kinds of layers.
@pytest.mark.parametrize("family", ["llama", WINDOWED, "gemma3"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.usefixtures("on_flash_attention")
def test_embeddings_and_generation_behind_runs(
    family: str, k: int, tiny_checkpoint: Callable[..., Path]
) -> None:
    """In chunks of 48 tokens, so that runs cross their borders; with hits of the prefix cache."""
    folder = tiny_checkpoint(family, k=k)
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    shapes = [(5, 3), (31, 40), (32, 0), (47, 9, 33), (1, 1, 1, 0)]
    prompts = [with_runs(special_ids, *shape, seed=10 + i) for i, shape in enumerate(shapes)]
    texts = [*random_prompts([1, 17, 32, 64, 90]), prompts[0], prompts[3]]
    load = MixedLoad.of(folder, prompts, texts, new=12)
    with running_engine(folder, max_model_len=256, max_num_batched_tokens=48, block_size=16) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        attention = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
        assert attention == {GemFlashAttentionImpl}
        before = free_blocks(llm)
        for _ in range(2):
            load.check(llm)
        assert free_blocks(llm) == before


@pytest.mark.usefixtures("on_flash_attention")
def test_bfloat16(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=4)
    prompts = random_prompts([1, 17, 64, 120])
    with running_engine(folder, max_model_len=256, dtype="bfloat16") as llm:
        found = embed(llm, prompts)
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.999
