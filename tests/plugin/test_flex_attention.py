"""The GEM mask on vLLM's FlexAttention backend, which runs here over a kernel in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.attention.backends import flex_attention

from gem_vllm.config import GemConfig
from gem_vllm.mask import gem_mask
from gem_vllm.plugin.flex_attention import SeenRows, sees
from gem_vllm.plugin.runs import find_runs
from gem_vllm.plugin.step import GemStep
from tests.plugin import flex_attention as in_torch
from tests.plugin.conftest import attending_by, random_prompts, running_engine
from tests.plugin.mixed_load import MixedLoad, with_runs
from tests.tiny import WINDOWED

SPECIAL = (900, 901, 902)


@pytest.fixture
def on_flex_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models that are loaded from here on attend by FlexAttention."""
    monkeypatch.setattr(flex_attention, "flex_attention_compiled", in_torch.flex_attention)
    with attending_by(f"{in_torch.__name__}.FlexAttentionOnCPU"):
        yield


@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 12),
    begin=st.integers(0, 12),
)
def test_what_rows_see(parts: list[int], window: int | None, begin: int) -> None:
    """Of a sequence of which `begin` tokens are computed: what `gem_mask` shows them."""
    prompt = [token for n in parts for token in [*range(n), *SPECIAL]]
    begin = min(begin, len(prompt) - 1)
    count = len(prompt) - begin
    step = GemStep.of_batch(
        {0: find_runs(prompt, SPECIAL)},
        {0},
        np.array([begin]),
        np.array([count]),
        torch.device("cpu"),
    )
    assert step is not None
    seen = SeenRows.of_step(step, count, block_size=16)
    row = torch.arange(begin, len(prompt))[:, None]
    start, end = (torch.from_numpy(x)[:, None] for x in (seen.start, seen.end))
    found = sees(start, end, row, torch.arange(len(prompt)), window)
    expected = gem_mask(torch.tensor(prompt), SPECIAL, sliding_window=window)
    assert torch.equal(found, expected[begin:])


@pytest.mark.parametrize("family", ["llama", WINDOWED, "gemma3"])
@pytest.mark.usefixtures("on_flex_attention")
def test_embeddings_and_generation_behind_runs(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """In chunks of 48 tokens, so that runs cross their borders; with hits of the prefix cache."""
    folder = tiny_checkpoint(family, k=4)
    special_ids = GemConfig.from_pretrained(folder).special_token_ids
    shapes = [(5, 3), (31, 40), (47, 9, 33), (1, 1, 1, 0)]
    prompts = [with_runs(special_ids, *shape, seed=10 + i) for i, shape in enumerate(shapes)]
    texts = [*random_prompts([1, 17, 64]), prompts[0], prompts[2]]
    load = MixedLoad.of(folder, prompts, texts, new=12)
    # Its first run starts a chunk, where no other row looks as far back.
    alone = with_runs(special_ids, 33, 9, seed=20)
    one = MixedLoad.of(folder, [alone], [], new=12)
    with running_engine(
        folder,
        max_model_len=256,
        max_num_batched_tokens=48,
        block_size=16,
        num_gpu_blocks_override=80,
    ) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        attention = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
        assert attention == {in_torch.FlexImplOnCPU}
        for _ in range(2):
            load.check(llm)
        one.check(llm)
