"""`GemBatch` without an engine: requests in chunks give the embeddings of whole ones."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import PoolingParams, SamplingParams
from vllm.v1.core.sched.output import NewRequestData

from gem_vllm.config import GemConfig
from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.batch import GemBatch
from gem_vllm.plugin.pooler import pool_special_tokens

SPECIAL = (900, 901, 902)
CONFIG = GemConfig(SPECIAL, pooling="mean", base_model="b")
HIDDEN = 5


def request(name: str, prompt: list[int], **options: object) -> NewRequestData:
    fields = {
        "mm_features": [],
        "sampling_params": None,
        "pooling_params": None,
        "block_ids": ([],),
        "num_computed_tokens": 0,
        "lora_request": None,
    }
    return NewRequestData(req_id=name, prompt_token_ids=prompt, **{**fields, **options})


def hidden_states_of(prompt: list[int], seed: int) -> torch.Tensor:
    return torch.randn(len(prompt), HIDDEN, generator=torch.Generator().manual_seed(seed))


@given(
    # Of each text: tokens of its parts, between which there are runs.
    texts=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    chunks=st.lists(st.integers(1, 9), min_size=1),
    with_chat=st.booleans(),
)
def test_chunks_of_any_size(texts: list[list[int]], chunks: list[int], with_chat: bool) -> None:
    batch = GemBatch(CONFIG, torch.device("cpu"))
    prompts = {
        f"text-{i}": [token for n in parts for token in [*range(n), *SPECIAL]]
        for i, parts in enumerate(texts)
    }
    new = [
        request(name, prompt, pooling_params=PoolingParams(task="embed", dimensions=3 + i % 2))
        for i, (name, prompt) in enumerate(prompts.items())
    ]
    if with_chat:
        prompts["chat"] = list(range(7))
        new.append(request("chat", prompts["chat"], sampling_params=SamplingParams(max_tokens=9)))
    batch.add(new)
    assert all(one.sampling_params is not None for one in new)
    states = {name: hidden_states_of(prompt, i) for i, (name, prompt) in enumerate(prompts.items())}
    computed, found = dict.fromkeys(prompts, 0), {}
    model = SimpleNamespace(logits_rows=None, last_mlp=SimpleNamespace(read_rows=None))
    sizes = itertools.cycle(chunks)
    while left := [name for name, n in computed.items() if n < len(prompts[name])]:
        scheduled = [min(next(sizes), len(prompts[name]) - computed[name]) for name in left]
        begin = [computed[name] for name in left]
        plan = batch.begin(
            model,
            left,
            np.array(begin),
            np.array(scheduled),
            num_drafts=None,
            all_rows_are_read=False,
            loras=False,
        )
        assert gem_step.current() is plan.step
        assert [left[i] for i in plan.embedding] == [name for name in left if name != "chat"]
        batch.end_forward(model)
        assert gem_step.current() is None
        ends = zip(left, begin, scheduled, strict=True)
        computed_now = torch.cat([states[name][b : b + n] for name, b, n in ends])
        for part in batch.embed(computed_now):
            found.update(zip(part.request_ids, part.values, strict=True))
        computed.update((name, b + n) for name, b, n in zip(left, begin, scheduled, strict=True))
    assert found.keys() == prompts.keys() - {"chat"}
    for i, name in enumerate(found):
        special = states[name][-len(SPECIAL) :]
        size = batch.pooling_params[name].dimensions
        assert torch.equal(found[name], pool_special_tokens(special, CONFIG, dimensions=size)), i
    batch.finish(prompts)
    assert [*batch.runs, *batch.pooling_params, *batch.partial_states] == []


def test_what_is_read_of_the_last_layer() -> None:
    """A chat that decodes, a text with a run inside and one behind it."""
    batch = GemBatch(CONFIG, torch.device("cpu"))
    text = [*range(4), *SPECIAL, *range(5), *SPECIAL]
    batch.add(
        [
            request("chat", [1, 2], sampling_params=SamplingParams()),
            request("text", text, pooling_params=PoolingParams(task="embed")),
        ]
    )
    model = SimpleNamespace(logits_rows=None, last_mlp=SimpleNamespace(read_rows=None))
    columns = ["chat", "text"], np.array([2, 0]), np.array([1, len(text)])
    batch.begin(model, *columns, num_drafts=None, all_rows_are_read=False, loras=False)
    assert model.logits_rows.tolist() == [0]
    assert model.last_mlp.read_rows.rows.tolist() == [13, 14, 15, 0]
    assert model.last_mlp.read_rows.special.tolist() == [0, 1, 2]
    batch.begin(model, *columns, num_drafts=None, all_rows_are_read=True, loras=True)
    assert model.logits_rows is None
    assert model.last_mlp.read_rows is None
    batch.end_forward(model)


def test_rows_to_sample_from_with_drafts() -> None:
    """A text between a chat with two drafts and one without; a chat whose prompt is not done."""
    batch = GemBatch(CONFIG, torch.device("cpu"))
    text = [*range(4), *SPECIAL]
    batch.add([request("text", text, pooling_params=PoolingParams(task="embed"))])
    model = SimpleNamespace(logits_rows=None, last_mlp=SimpleNamespace(read_rows=None))
    batch.begin(
        model,
        ["two", "text", "none", "prompt"],
        np.array([20, 0, 9, 0]),
        np.array([3, len(text), 1, 30]),
        num_drafts=np.array([2, 0, 0, 0]),
        all_rows_are_read=False,
        loras=False,
    )
    batch.end_forward(model)
    # Logits of the first chat's three rows, the text's, the second chat's, the prompt's.
    assert model.logits_rows.tolist() == [0, 1, 2, 4, 5]


def test_what_is_read_with_drafts() -> None:
    batch = GemBatch(CONFIG, torch.device("cpu"))
    last_mlp = SimpleNamespace(read_rows=None)
    batch.begin(
        SimpleNamespace(logits_rows=None, last_mlp=last_mlp),
        ["two", "prompt"],
        np.array([20, 0]),
        np.array([3, 30]),
        num_drafts=np.array([2, 0]),
        all_rows_are_read=False,
        loras=False,
    )
    gem_step.publish(None)
    assert last_mlp.read_rows.rows.tolist() == [0, 1, 2, 32]
