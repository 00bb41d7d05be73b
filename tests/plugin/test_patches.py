"""The ledger: every patch is in place, argued, and loud where vLLM has moved."""

from __future__ import annotations

import pkgutil
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from vllm import PoolingParams
from vllm.config import PoolerConfig, SpeculativeConfig, VllmConfig
from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor
from vllm.entrypoints.pooling.offline import PoolingOfflineMixin
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.outputs import PoolingRequestOutput
from vllm.plugins import load_general_plugins
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RequestOutputKind
from vllm.v1.attention import selector
from vllm.v1.attention.backends import registry
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import (
    OutputProcessor,
    RequestOutputCollector,
    RequestState,
)

from gem_vllm import compat
from gem_vllm.config import SUPPORTED_ARCHITECTURES
from gem_vllm.errors import GemError
from gem_vllm.plugin import patches, register
from gem_vllm.plugin.config import GemModelConfig

NAMES = {
    "config-hook",
    "backend-of-later-models",
    "graphs-beside-pooling",
    "offline-pooling",
    "embedding-inputs",
    "reserved-token-ids",
    "prompts-of-requests",
    "embedding-with-answer",
    "interval-of-embeddings",
    "aborted-embeddings",
    "texts-to-judge",
    "rows-without-lora",
    "draft-vocabulary",
}


@pytest.fixture(autouse=True)
def plugins() -> None:
    load_general_plugins()


def test_every_patch_is_listed_and_argued() -> None:
    assert {patch.name for patch in patches.LEDGER} == NAMES
    for patch in patches.LEDGER:
        assert len(patch.why) > 40, patch.name
        assert len(patch.needless_when) > 20, patch.name
        assert pkgutil.resolve_name(patch.target.split()[0]) is not None


def test_config_hook_is_in_place() -> None:
    for architecture in SUPPORTED_ARCHITECTURES.values():
        assert MODELS_CONFIG_MAP[architecture] is GemModelConfig


@pytest.mark.parametrize(
    ("owner", "attribute"),
    [
        (registry, "register_backend"),
        (VllmConfig, "__post_init__"),
        (PoolingOfflineMixin, "__init__"),
        (PoolingIOProcessor, "render"),
        (InputProcessor, "process_inputs"),
        (OnlineRenderer, "preprocess_completion"),
        (OnlineRenderer, "preprocess_chat"),
        (OpenAIServingChat, "create_chat_completion"),
        (OpenAIServingCompletion, "create_completion"),
        (RequestState, "from_new_request"),
        (RequestState, "make_request_output"),
        (OutputProcessor, "process_outputs"),
        (ServingGenerativeScoring, "_build_prompts"),
        (lora_ops, "bgmv_shrink"),
        (lora_ops, "bgmv_expand"),
        (punica_cpu, "bgmv_shrink"),
        (punica_cpu, "bgmv_expand"),
        (SpeculativeConfig, "verify_equal_vocab_size_if_draft_model"),
    ],
)
def test_function_is_wrapped_once(owner: Any, attribute: str) -> None:
    patches.apply_all()
    function = getattr(owner, attribute)
    assert function.__globals__["__name__"] == "gem_vllm.plugin.patches"
    assert function.__wrapped__.__globals__["__name__"].startswith("vllm.")


@pytest.mark.parametrize(
    ("owner", "attribute", "patch"),
    [
        (registry, "register_backend", "_patch_backend_of_later_models"),
        (selector, "_cached_get_attn_backend", "_patch_backend_of_later_models"),
        (VllmConfig, "__post_init__", "_patch_graphs_beside_pooling"),
        (InputProcessor, "process_inputs", "_patch_reserved_token_ids"),
        (PoolingIOProcessor, "render", "_patch_embedding_inputs"),
        (PoolingOfflineMixin, "_verify_pooling_task", "_patch_offline_pooling"),
        (OnlineRenderer, "preprocess_completion", "_patch_prompts_of_requests"),
        (OnlineRenderer, "preprocess_chat", "_patch_prompts_of_requests"),
        (OpenAIServingChat, "create_chat_completion", "_patch_embedding_with_answer"),
        (OpenAIServingCompletion, "create_completion", "_patch_embedding_with_answer"),
        (RequestState, "from_new_request", "_patch_interval_of_embeddings"),
        (RequestState, "make_request_output", "_patch_aborted_embeddings"),
        (OutputProcessor, "process_outputs", "_patch_aborted_embeddings"),
        (ServingGenerativeScoring, "_build_prompts", "_patch_texts_to_judge"),
        (lora_ops, "bgmv_shrink", "_patch_rows_without_lora"),
        (lora_ops, "bgmv_expand", "_patch_rows_without_lora"),
        (
            SpeculativeConfig,
            "verify_equal_vocab_size_if_draft_model",
            "_patch_draft_vocabulary",
        ),
    ],
)
def test_a_moved_vllm_is_named(
    owner: Any, attribute: str, patch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def moved(self: Any, other: Any) -> None:
        """Stands for a vLLM whose function takes something else."""

    monkeypatch.setattr(owner, attribute, moved)
    with pytest.raises(GemError, match=r"vLLM has moved under gem-vllm's patch '[a-z-]+'"):
        getattr(patches, patch)()


@pytest.mark.parametrize("updated", [False, True], ids=["a config", "a copy"])
def test_a_copy_of_a_config_keeps_its_graphs(
    updated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a model has a pooler, vLLM takes it to have no use for full graphs."""
    seen: list[Any] = []

    def original(self: Any) -> None:
        if self.model_config.pooler_config is not None:
            seen.append(self.model_config.pooler_config)

    monkeypatch.setattr(VllmConfig, "__post_init__", original)
    monkeypatch.setattr(patches, "gem_config_of", lambda _: object())
    patches._patch_graphs_beside_pooling()
    given = PoolerConfig(task="embed")
    config = SimpleNamespace(
        model_config=SimpleNamespace(config_updated=updated, pooler_config=given)
    )
    VllmConfig.__post_init__(config)
    assert seen == ([] if updated else [given])  # a user's is for vLLM to see, and for us to refuse
    assert config.model_config.pooler_config.task == "embed"


@pytest.mark.parametrize("by", ["the engine", "its id"])
def test_an_aborted_embedding_is_told_and_fails_nothing_else(by: str) -> None:
    processor = OutputProcessor(None, log_stats=False)
    request = EngineCoreRequest(
        request_id="one",
        external_req_id="one",
        prompt_token_ids=[5, 6],
        mm_features=None,
        sampling_params=None,
        pooling_params=PoolingParams(task="embed"),
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    queue = RequestOutputCollector(RequestOutputKind.FINAL_ONLY, "one")
    processor.add_request(request, prompt=None, queue=queue)
    if by == "the engine":  # as it does when it is paused, or put to sleep
        ended = EngineCoreOutput("one", [], finish_reason=FinishReason.ABORT)
        processor.process_outputs([ended])
    else:
        processor.abort_requests(["one"], internal=True)
    output = queue.get_nowait()
    assert isinstance(output, PoolingRequestOutput)
    assert output.finished
    assert output.outputs.data.numel() == 0
    assert Version(compat.installed_vllm()) < Version("0.32") or output.error.retryable
    assert not processor.has_unfinished_requests()


@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand"])
def test_rows_without_a_lora_get_nothing_of_one(name: str) -> None:
    """As a LoRA on the embedding has its rows: straight from `bgmv_expand`."""
    patched = getattr(punica_cpu, name)
    indices = torch.tensor([0, -1, 1, -1])
    inputs, weights = torch.randn(4, 3), torch.randn(2, 1, 5, 3)
    output = torch.zeros(4, 5)
    patched(inputs, weights, output, indices)
    expected = torch.zeros(4, 5)
    for row in (0, 2):
        expected[row] = weights[indices[row], 0] @ inputs[row]
    torch.testing.assert_close(output, expected)


def test_a_vanished_target_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patches, "_applied", set())
    monkeypatch.delattr(InputProcessor, "process_inputs")
    with pytest.raises(GemError, match="patch 'reserved-token-ids'"):
        patches.apply_all()


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "1.0"])
def test_other_vllm_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "installed_vllm", lambda: version)
    with pytest.raises(GemError, match=re.escape(compat.SUPPORTED_VLLM)):
        register()
