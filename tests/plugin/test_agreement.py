"""The engine's embeddings against the float32 reference, alone and in batches with generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from gem_vllm.reference import ReferenceEmbedder
from tests.plugin.conftest import (
    EMBED,
    cosines,
    embed,
    embeddings_of,
    named,
    noted_preemptions,
    random_prompts,
    run_together,
    running_engine,
    step_counts,
)
from tests.tiny import FAMILIES, WINDOWED

LIMIT = 256
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def lengths(k: int) -> list[int]:
    """1 to the limit, around KV blocks of 32 and 128 tokens, so that runs cross their borders."""
    return [1, 2, 17, 32, 127 - k, 128 - k, 130 - k, 127, 128, 129, LIMIT - k - 2, LIMIT - k - 1]


@pytest.mark.parametrize(
    ("family", "k"), [*((family, k) for family in FAMILIES for k in (1, 4, 10)), (WINDOWED, 4)]
)
def test_float32_alone_and_mixed(family: str, k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint(family, k=k)
    prompts = random_prompts(lengths(k))
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(folder, max_model_len=LIMIT) as llm:
        assert cosines(embed(llm, prompts), expected).min() >= 0.9999
        embedded = step_counts(llm)
        assert embedded.keys() == {"embed"}

        questions = random_prompts([5, 40, 130], seed=1)
        alone = run_together(llm, named("chat", questions, GREEDY))
        generated = step_counts(llm)
        assert generated.keys() == {"embed", "generate"}
        assert generated["embed"] == embedded["embed"]
        outputs = run_together(
            llm,
            named("chat", questions, GREEDY) | named("text", prompts, EMBED),
        )
        assert step_counts(llm)["mixed"] > 0
    mixed = embeddings_of(outputs, len(prompts))
    assert cosines(mixed, expected).min() >= 0.9999
    for name, output in alone.items():
        assert outputs[name].outputs[0].token_ids == output.outputs[0].token_ids
    for i, prompt in enumerate(prompts):
        assert outputs[f"text-{i}"].prompt_token_ids == prompt  # special tokens are not the user's


@pytest.mark.parametrize("k", [1, 4, 10])
def test_bfloat16(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=k)
    prompts = random_prompts(lengths(k))
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(folder, max_model_len=LIMIT, dtype="bfloat16") as llm:
        assert cosines(embed(llm, prompts), expected).min() >= 0.999


def test_compiled(tiny_checkpoint: Callable[..., Path]) -> None:
    """As `vllm serve` runs without --enforce-eager."""
    folder = tiny_checkpoint("llama", k=4)
    prompts, questions = random_prompts([1, 30, 130]), random_prompts([5, 40], seed=1)
    requests = named("text", prompts, EMBED) | named("chat", questions, GREEDY)
    with running_engine(folder, max_model_len=LIMIT, enforce_eager=False) as llm:
        last_mlp = rows_of_the_last_mlp(llm)
        compiled = run_together(llm, requests)
        # Of three texts the special tokens, of two questions their last tokens.
        assert last_mlp[0] == 3 * 4 + 2
    with running_engine(folder, max_model_len=LIMIT) as llm:
        eager = run_together(llm, requests)
    found = embeddings_of(compiled, len(prompts))
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999
    for name in ("chat-0", "chat-1"):
        assert compiled[name].outputs[0].token_ids == eager[name].outputs[0].token_ids


@pytest.mark.parametrize("train_mode", ["full", "lora"])
def test_without_adapter(train_mode: str, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=4, train_mode=train_mode)
    prompts = random_prompts([3, 60])
    with running_engine(folder, max_model_len=LIMIT) as llm:
        assert cosines(embed(llm, prompts), ReferenceEmbedder(folder).embed(prompts)).min() > 0.9999


def test_an_adapter_on_some_layers(tiny_checkpoint: Callable[..., Path]) -> None:
    """Of q, k and v one, of gate and up one: each a part of a layer that vLLM packs; no down."""
    folder = tiny_checkpoint("llama", k=4, target_modules=("v_proj", "o_proj", "up_proj"))
    prompts = random_prompts([3, 60])
    with running_engine(folder, max_model_len=LIMIT) as llm:
        names = llm.llm_engine.vllm_config.additional_config["gem_lora"]
        found = embed(llm, prompts)
    assert set(names) == {
        f"model.layers.{layer}.{linear}.gem_lora"
        for layer in range(2)
        for linear in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj")
    }
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999


def rows_of_the_last_mlp(llm: LLM) -> list[int]:
    """A list that gets the number of rows of every step that the last layer's MLP computes."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.get_model()
    rows: list[int] = []
    linear = model.model.layers[-1].mlp.gate_up_proj
    linear.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_computes_what_is_read(
    family: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    k, prompts, questions = 4, random_prompts([30, 70]), random_prompts([25, 50, 9], seed=1)
    with running_engine(tiny_checkpoint(family, k=k), max_model_len=LIMIT) as llm:
        rows = rows_of_the_last_mlp(llm)
        embed(llm, prompts)
        run_together(llm, named("text", prompts, EMBED) | named("chat", questions, GREEDY))
    read, decoding = k * len(prompts), len(questions)
    assert rows == [read, read + decoding, *[decoding] * (GREEDY.max_tokens - 1)]


def test_the_adapter_is_among_the_models_buffers(tiny_checkpoint: Callable[..., Path]) -> None:
    """Those outlive vLLM's sleep at level 2 (on CUDA), which drops all weights."""
    with running_engine(tiny_checkpoint("llama", k=4), max_model_len=LIMIT) as llm:
        config = llm.llm_engine.vllm_config
        worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        kept = {id(buffer) for buffer in worker.model_runner.model.buffers()}
        names = config.additional_config["gem_lora"]
        assert len(names) > 0
        for name in names:
            lora = config.compilation_config.static_forward_context[name]
            assert {id(weight) for weight in lora.weights} <= kept


def test_weights_are_loaded_again(tiny_checkpoint: Callable[..., Path]) -> None:
    """As after vLLM's sleep at level 2; the adapter's stay."""
    folder = tiny_checkpoint("llama", k=4)
    prompts = random_prompts([7, 90])
    with running_engine(folder, max_model_len=LIMIT) as llm:
        llm.collective_rpc("reload_weights")
        with pytest.raises(ValueError, match="start an engine with it"):
            llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        found = embed(llm, prompts)
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999


@pytest.mark.parametrize("k", [1, 4])
def test_the_longest_text_in_chunks(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=k)
    prompts = random_prompts([LIMIT - k - 1, LIMIT - k - 2, LIMIT - k - 1])
    with running_engine(folder, max_model_len=LIMIT, max_num_batched_tokens=64) as llm:
        found = embed(llm, prompts)
    assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999


def test_an_instruction_goes_behind_every_text(tiny_checkpoint: Callable[..., Path]) -> None:
    """Also where it straddles a KV block, and up to the limit, of which it takes its part."""
    instruction = tuple(range(70, 77))
    folder = tiny_checkpoint("llama", k=4, instruction_ids=instruction)
    longest = LIMIT - 4 - len(instruction) - 1
    prompts = random_prompts([1, 30, 118, 122, 126, longest])
    with running_engine(folder, max_model_len=LIMIT) as llm:
        # Twice: the second time from the prefix cache, which ends with the text.
        for _ in range(2):
            found = embed(llm, prompts)
            assert cosines(found, ReferenceEmbedder(folder).embed(prompts)).min() >= 0.9999
        with pytest.raises(VLLMValidationError, match=f"context length is {longest} tokens"):
            embed(llm, random_prompts([longest + 1]))


def test_concat_dimensions_and_raw_pooling(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("qwen3", k=4, pooling="concat")
    prompts = random_prompts([7, 90])
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(folder, max_model_len=LIMIT) as llm:
        whole = embed(llm, prompts)
        assert whole.shape == (2, 4 * 64)
        assert cosines(whole, expected).min() >= 0.9999

        cut = EMBED.clone()
        cut.dimensions = 100
        raw = EMBED.clone()
        raw.use_activation = False
        outputs = run_together(llm, {"cut": (prompts[0], cut), "raw": (prompts[0], raw)})
    leading = torch.nn.functional.normalize(whole[0, :100], dim=0)
    torch.testing.assert_close(outputs["cut"].outputs.data, leading, atol=1e-5, rtol=0)
    data = outputs["raw"].outputs.data
    assert abs(float(data.norm()) - 1) > 1e-3
    assert cosines(data[None], expected[:1]).min() >= 0.9999


def test_special_tokens_do_not_see_each_other(tiny_checkpoint: Callable[..., Path]) -> None:
    """A plain causal mask would give another embedding: the agreement above means the GEM mask."""
    folder = tiny_checkpoint("llama", k=4)
    reference = ReferenceEmbedder(folder)
    prompt = random_prompts([20])[0]
    special = list(reference.gem_config.special_token_ids)
    reference._at_special = torch.isin(
        torch.tensor(prompt + special), torch.tensor(special)
    ).unsqueeze(-1)
    with torch.no_grad():
        causal = reference.model.base_model(input_ids=torch.tensor([prompt + special]))
    pooled = causal.last_hidden_state[0, -4:].mean(0)
    assert cosines(pooled[None], reference.embed([prompt])).item() < 0.999


@pytest.mark.parametrize("k", [4, 10])
def test_special_tokens_across_chunks(k: int, tiny_checkpoint: Callable[..., Path]) -> None:
    """With a budget of 16 tokens a step, the run falls across two steps at every offset."""
    folder = tiny_checkpoint("llama", k=k)
    prompts = random_prompts(range(30, 48))
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(
        folder, max_model_len=LIMIT, max_num_batched_tokens=16, max_num_seqs=8
    ) as llm:
        for prompt, reference in zip(prompts, expected, strict=True):
            assert cosines(embed(llm, [prompt]), reference[None]).item() >= 0.9999
        assert cosines(embed(llm, prompts), expected).min() >= 0.9999


def test_prefix_cache_hits_end_with_the_text(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("llama", k=10)
    block = 32
    prompts = random_prompts([block * n - shift for n in (1, 2, 6) for shift in (0, 5, 9, 10, 11)])
    expected = ReferenceEmbedder(folder).embed(prompts)
    with running_engine(folder, max_model_len=512, enable_prefix_caching=True) as llm:
        assert cosines(embed(llm, prompts), expected).min() >= 0.9999
        outputs = run_together(llm, named("text", prompts, EMBED))
        cached = [outputs[f"text-{i}"].num_cached_tokens for i in range(len(prompts))]
        again = embeddings_of(outputs, len(prompts))
        assert cosines(again, expected).min() >= 0.9999
        assert llm.llm_engine.vllm_config.cache_config.block_size == block
        assert cached == [len(prompt) // block * block for prompt in prompts]
        # The same blocks serve generation.
        chat = run_together(llm, {"chat": (prompts[-1], GREEDY)})["chat"]
        assert chat.num_cached_tokens == len(prompts[-1]) // block * block


def test_preempted_embeddings_come_out_right(tiny_checkpoint: Callable[..., Path]) -> None:
    """A KV cache of 32 blocks for requests of 4 to 10: some are preempted and start over."""
    folder = tiny_checkpoint("llama", k=4)
    texts = random_prompts([150, 200, 240, 100, 250, 160])
    expected = ReferenceEmbedder(folder).embed(texts)
    long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    chats = random_prompts([100, 110, 120, 90], seed=3)
    with running_engine(folder, max_model_len=512, num_gpu_blocks_override=32) as llm:
        preempted = noted_preemptions(llm)
        outputs = run_together(
            llm,
            named("chat", chats, long) | named("text", texts, EMBED),
        )
    mixed = embeddings_of(outputs, len(texts))
    assert cosines(mixed, expected).min() >= 0.9999
    assert all(len(outputs[f"chat-{i}"].outputs[0].token_ids) == 200 for i in range(len(chats)))
    assert preempted
