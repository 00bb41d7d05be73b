"""What only CUDA has, as far as it can be tried without: choices of graphs, plans, copies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.utils.torch_utils import LayerNameType
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from gem_vllm.plugin import step as gem_step
from gem_vllm.plugin.attention import MaskedMetadataBuilder, block_tables_from
from gem_vllm.plugin.batch import Embeddings, Plan
from gem_vllm.plugin.embeddings_output import EmbeddingsOutput
from gem_vllm.plugin.flash_attention import GemFlashAttentionMetadataBuilder, SpecialRows
from gem_vllm.plugin.runner import GemModelRunner
from gem_vllm.plugin.runner_v2 import GemCudaGraphManager, GemModelRunnerV2
from tests.plugin.steps import SPECIAL, step_of


@contextlib.contextmanager
def published(step: gem_step.GemStep | None) -> Iterator[None]:
    gem_step.publish(step)
    try:
        yield
    finally:
        gem_step.publish(None)


class GraphChoice:
    """In the place of vLLM's V1 runner: what it is asked to choose a CUDA graph by."""

    def _determine_batch_execution_and_padding(self, **asked: Any) -> dict[str, Any]:
        return asked


class GemGraphChoice(GemModelRunner, GraphChoice):
    pass


# Steps of two tokens, each of a sequence that has more before it.
PLAIN = [7] * 9, 9, 1
SPECIAL_TOKEN = [*[7] * 9, *SPECIAL], 11, 1
BEHIND_A_RUN = [7, *SPECIAL, *[7] * 9], 12, 1


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (PLAIN, {}),
        (SPECIAL_TOKEN, {"force_eager": True, "force_uniform_decode": False}),
        (BEHIND_A_RUN, {"force_eager": False, "force_uniform_decode": False}),
    ],
)
def test_cuda_graphs_are_of_steps_like_those_they_were_captured_in(
    second: tuple[list[int], int, int], expected: dict[str, Any]
) -> None:
    with published(step_of(set(), ([7] * 40, 40, 1), second)):
        asked = object.__new__(GemGraphChoice)._determine_batch_execution_and_padding(num_tokens=2)
    assert asked == {"num_tokens": 2, **expected}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (PLAIN, CUDAGraphMode.FULL),
        (SPECIAL_TOKEN, CUDAGraphMode.NONE),
        (BEHIND_A_RUN, CUDAGraphMode.PIECEWISE),
    ],
)
@pytest.mark.parametrize("limits", [{"uniform_token_count": 1}, {"max_query_len": 1}])
def test_cuda_graphs_of_the_v2_runner(
    limits: dict[str, int], second: tuple[list[int], int, int], expected: CUDAGraphMode
) -> None:
    """`limits`: of the full graph, which is of decoding in both."""
    manager = object.__new__(GemCudaGraphManager)
    manager._graphs_captured = True
    full = BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens=4, num_reqs=4, **limits)
    piecewise = BatchExecutionDescriptor(CUDAGraphMode.PIECEWISE, num_tokens=8, num_reqs=None)
    manager._candidates = {(2, 0): [full, piecewise]}
    with published(step_of(set(), ([7] * 40, 40, 1), second)):
        chosen = manager.dispatch(2, 2, 1, num_active_loras=0, max_query_len=1)
    assert chosen.cg_mode == expected
    assert chosen.num_tokens == {"FULL": 4, "PIECEWISE": 8, "NONE": 2}[expected.name]


@pytest.mark.parametrize(
    ("second", "expected"), [(PLAIN, True), (SPECIAL_TOKEN, False), (BEHIND_A_RUN, False)]
)
def test_a_drafting_head_has_full_graphs_where_the_model_has_them(
    second: tuple[list[int], int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On V2 it chooses by itself, by what the batch is said to be."""
    of_vllm = dict.fromkeys(BatchReqState._fields) | {
        "req_ids": ["a", "b"],
        "idx_mapping_np": np.arange(2),
        "decode_graph_eligible": True,
    }
    monkeypatch.setattr(
        GPUModelRunner, "gather_batch_req_state", lambda *_: (BatchReqState(**of_vllm), 1)
    )
    runner = object.__new__(GemModelRunnerV2)
    plan = Plan(["a", "b"], np.empty(0, dtype=np.int64), [], step_of(set(), second))
    runner.gem_batch = Mock(begin=Mock(return_value=plan))
    runner.model = runner.prompt_logprobs_worker = runner.lora_config = None
    runner.req_states = Mock(num_computed_tokens_np=np.zeros(2, dtype=np.int64))
    state, uniform_token_count = runner.gather_batch_req_state(Mock(), dummy_run=False)
    assert state.decode_graph_eligible == expected
    assert uniform_token_count == (1 if expected else None)


def test_the_first_plan_ahead_finds_out_the_layers_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM looks at them in its first plan, which a step behind a run does not make."""

    def build(self: Any, *args: Any) -> str:
        self.aot_sliding_window = self.aot_sliding_window or (-1, -1)
        return "metadata"

    monkeypatch.setattr(MaskedMetadataBuilder, "build", build)
    assert hasattr(FlashAttentionMetadataBuilder, "build")
    builder = object.__new__(GemFlashAttentionMetadataBuilder)
    builder.aot_sliding_window = None
    with published(step_of(set(), BEHIND_A_RUN)):
        assert builder.build(0, Mock()) == "metadata"
        assert builder.aot_sliding_window is None
    builder.build(0, Mock())
    with published(step_of(set(), BEHIND_A_RUN)):
        builder.build(0, Mock())
    assert builder.aot_sliding_window == (-1, -1)


def test_names_of_adapters_are_no_constants_of_a_graph() -> None:
    """Else each layer's graph is one of its own, to be compiled and kept."""
    *_, name = torch.ops.vllm.gem_special_lora.default._schema.arguments
    assert (str(name.type) == "str") == (LayerNameType is str)


def test_block_tables_are_no_wider_than_what_is_read() -> None:
    table = torch.arange(40, dtype=torch.int32).reshape(2, 20)
    found = block_tables_from(table, torch.tensor([1, 0, 1]), torch.tensor([0, 3, 19]), 2)
    assert found.dtype == torch.int32
    assert found[:, 0].tolist() == [20, 3, 39]
    assert found[:2, 1].tolist() == [21, 4]
    texts = ([*range(20), *SPECIAL], 0, 23), ([*range(3), *SPECIAL], 0, 6)
    rows = SpecialRows.of_step(step_of({0, 1}, *texts), table, block_size=16)
    assert rows.block_table.shape == (4, 2)  # not those of a run's first special token


class WrappedRunner:
    """In the place of vLLM's V1 runner, whose model is wrapped for full graphs."""

    model, raw = object(), Mock()
    lora_config = speculative_config = None
    num_prompt_logprobs = ()
    execute_model_state = SimpleNamespace(hidden_states=None)
    async_output_copy_stream = Mock()
    sampled: Any = None

    def get_model(self) -> Any:
        return self.raw

    def _prepare_inputs(self, *args: Any) -> str:
        return "prepared"

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self.sampled


class GemWrappedRunner(GemModelRunner, WrappedRunner):
    gem_drafts_from_rows = False


def test_a_step_is_told_to_the_model_and_not_to_what_wraps_it() -> None:
    runner = object.__new__(GemWrappedRunner)
    plan = Plan(["a"], np.empty(0, dtype=np.int64), [], None)
    runner.gem_batch = Mock(begin=Mock(return_value=plan), position_shift=Mock(return_value=None))
    runner.input_batch = Mock(req_ids=["a"], num_computed_tokens_cpu=np.zeros(1, dtype=np.int64))
    scheduled = Mock(scheduled_spec_decode_tokens={})
    assert runner._prepare_inputs(scheduled, np.ones(1, dtype=np.int64)) == "prepared"
    assert runner.gem_batch.begin.call_args.args[0] is runner.raw


def test_v1_waits_for_no_embeddings_where_it_schedules_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Mock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    of_vllm = ModelRunnerOutput(req_ids=["a", "b"], req_id_to_index={"a": 0, "b": 1})
    runner = object.__new__(GemWrappedRunner)
    runner.sampled = Mock(spec=AsyncModelRunnerOutput, get_output=Mock(return_value=of_vllm))
    runner.gem_batch = Mock(
        embed=Mock(return_value=[Embeddings(["b"], torch.ones(1, 4))]),
        position_shift=Mock(return_value=None),
    )
    output = runner.sample_tokens(None)
    assert isinstance(output, EmbeddingsOutput)
    runner.sampled.get_output.assert_not_called()
    none, embedding = output.get_output().pooler_output
    assert none is None
    assert embedding.tolist() == [1.0] * 4
    output.copied.synchronize.assert_called_once_with()
