"""The ledger: every place where vLLM is changed for want of a public hook.

Each patch is one function, registered below with what it changes, why, and which change upstream
would make it needless. Each checks that the place it changes is still what it was written for, and
fails at plugin load with the patch's name if it is not.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gem_vllm.config import SUPPORTED_ARCHITECTURES, GemConfig
from gem_vllm.errors import GemError


@dataclass(frozen=True)
class Patch:
    """One entry of the ledger.

    Attributes:
        name: short name, used in error messages.
        target: dotted name of what is changed.
        why: what does not work without it.
        needless_when: the upstream change that would let us drop it.
        apply: makes the change; called once in a process.
    """

    name: str
    target: str
    why: str
    needless_when: str
    apply: Callable[[], None]


def gem_config_of(model_config: Any) -> GemConfig | None:
    """The GEM configuration of a vLLM `ModelConfig`; None for every other model."""
    if model_config.architecture not in SUPPORTED_ARCHITECTURES.values():
        return None
    return GemConfig.from_hf_config(model_config.hf_config)


def _remembered(owner: Any) -> GemConfig | None:
    """`gem_config_of` the model of an object of vLLM's that handles every request."""
    if "gem_config" not in vars(owner):
        owner.gem_config = gem_config_of(owner.model_config)
    return owner.gem_config


def _expect(condition: bool, patch: str, what: str) -> None:
    if not condition:
        raise GemError(
            f"vLLM has moved under gem-vllm's patch '{patch}': {what}. "
            "Install a vLLM version that this gem-vllm supports."
        )


def _expect_parameters(function: Callable[..., Any], patch: str, *names: str) -> None:
    parameters = inspect.signature(function).parameters
    missing = [name for name in names if name not in parameters]
    _expect(not missing, patch, f"{function.__qualname__} has no parameter {', '.join(missing)}")


def _patch_config_hook() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from gem_vllm.plugin.config import GemModelConfig

    _expect(isinstance(MODELS_CONFIG_MAP, dict), "config-hook", "MODELS_CONFIG_MAP is no dict")
    for architecture in SUPPORTED_ARCHITECTURES.values():
        MODELS_CONFIG_MAP[architecture] = GemModelConfig


def _patch_backend_of_later_models() -> None:
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends import registry

    original = registry.register_backend
    _expect_parameters(original, "backend-of-later-models", "backend", "class_path")
    _expect(
        hasattr(selector._cached_get_attn_backend, "cache_clear"),
        "backend-of-later-models",
        "_cached_get_attn_backend keeps no choices",
    )

    @functools.wraps(original)
    def register_backend(*args: Any, **kwargs: Any) -> Any:
        selector._cached_get_attn_backend.cache_clear()
        return original(*args, **kwargs)

    registry.register_backend = register_backend


def _patch_graphs_beside_pooling() -> None:
    from vllm.config import VllmConfig

    from gem_vllm.plugin.config import GemModelConfig

    original = VllmConfig.__post_init__
    _expect(
        "pooler_config is not None" in inspect.getsource(original),
        "graphs-beside-pooling",
        "VllmConfig.__post_init__ does not look at pooler_config",
    )

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        model_config = self.model_config
        is_gem = model_config is not None and gem_config_of(model_config) is not None
        if is_gem and model_config.config_updated:
            # A copy, as a draft's config is made: the pooler is ours, and the graphs are shared.
            model_config.pooler_config = None
        original(self)
        if is_gem:
            GemModelConfig.set_pooler(self)

    VllmConfig.__post_init__ = __post_init__


def _patch_offline_pooling() -> None:
    from vllm.entrypoints.pooling.offline import PoolingOfflineMixin

    original, run = PoolingOfflineMixin.__init__, PoolingOfflineMixin._run_tiling_engine
    _expect(
        "self.runner_type" in inspect.getsource(PoolingOfflineMixin._verify_pooling_task),
        "offline-pooling",
        "PoolingOfflineMixin._verify_pooling_task does not look at self.runner_type",
    )

    @functools.wraps(original)
    def __init__(self: Any) -> None:
        original(self)
        if gem_config_of(self.model_config) is not None:
            self.runner_type = "pooling"

    @functools.wraps(run)
    def _run_tiling_engine(self: Any, *args: Any, **kwargs: Any) -> Any:
        waiting = self.llm_engine.get_num_unfinished_requests()
        if waiting and gem_config_of(self.model_config) is not None:
            raise ValueError(
                f"{waiting} requests that were enqueued have no answers yet, which embeddings are "
                "not to be mixed up with: call wait_for_completion() before."
            )
        return run(self, *args, **kwargs)

    PoolingOfflineMixin.__init__ = __init__
    PoolingOfflineMixin._run_tiling_engine = _run_tiling_engine


def _patch_embedding_inputs() -> None:
    from vllm.entrypoints.pooling.base.io_processor import PoolingIOProcessor

    from gem_vllm.plugin.validation import bounded, refuse_empty_text

    original = PoolingIOProcessor.render
    _expect_parameters(original, "embedding-inputs", "render_params")

    @functools.wraps(original)
    def render(self: Any, render_params: Any) -> Any:
        gem_config = _remembered(self)
        if gem_config is not None:
            refuse_empty_text(render_params.get("prompts"))
            limit = gem_config.max_text_tokens(self.model_config.max_model_len)
            tok_params = bounded(render_params["tok_params"], limit)
            render_params = {**render_params, "tok_params": tok_params}
        return original(self, render_params)

    PoolingIOProcessor.render = render


def _patch_reserved_token_ids() -> None:
    from vllm import PoolingParams
    from vllm.v1.engine.input_processor import InputProcessor

    from gem_vllm.plugin.validation import (
        bounded_kwargs,
        check_request,
        is_from_text,
        is_rendered,
        refuse_empty_text,
    )

    original = InputProcessor.process_inputs
    _expect_parameters(
        original, "reserved-token-ids", "request_id", "prompt", "params", "tokenization_kwargs"
    )
    signature = inspect.signature(original)

    def cut_at_the_end(
        self: Any, gem_config: GemConfig, *args: Any, **kwargs: Any
    ) -> inspect.BoundArguments:
        """What a text that no renderer has seen is embedded with, as `embedding-inputs` has it."""
        bound = signature.bind(self, *args, **kwargs)
        if isinstance(bound.arguments["params"], PoolingParams):
            refuse_empty_text(bound.arguments["prompt"])
            limit = gem_config.max_text_tokens(self.model_config.max_model_len)
            given = bound.arguments.get("tokenization_kwargs")
            bound.arguments["tokenization_kwargs"] = bounded_kwargs(given, limit)
        return bound

    @functools.wraps(original)
    def process_inputs(self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        gem_config = _remembered(self)
        if gem_config is not None and not is_rendered(prompt):
            bound = cut_at_the_end(self, gem_config, request_id, prompt, *args, **kwargs)
            request = original(*bound.args, **bound.kwargs)
        else:
            request = original(self, request_id, prompt, *args, **kwargs)
        if gem_config is not None:
            check_request(
                request,
                gem_config,
                self.model_config.max_model_len,
                block_size=self.vllm_config.cache_config.block_size,
                from_text=is_from_text(prompt),
            )
        return request

    InputProcessor.process_inputs = process_inputs


def _patch_prompts_of_requests() -> None:
    from vllm.entrypoints.serve.tokenize.protocol import (
        TokenizeChatRequest,
        TokenizeCompletionRequest,
    )
    from vllm.renderers.online_renderer import OnlineRenderer

    from gem_vllm.plugin.compress import compress_prompt
    from gem_vllm.plugin.request_options import asked_for, refuse_options_of
    from gem_vllm.plugin.validation import check_prompt, is_from_text, refuse_echo

    def check(renderer: Any, request: Any, engine_inputs: Any) -> None:
        gem_config = _remembered(renderer)
        if gem_config is None or isinstance(
            request, (TokenizeChatRequest, TokenizeCompletionRequest)
        ):
            return
        for engine_input in engine_inputs:
            check_prompt(
                engine_input.get("prompt_token_ids") or (),
                getattr(request, "sampling_params", None) or request,
                gem_config,
                renderer.model_config.max_model_len,
                block_size=renderer.renderer.config.cache_config.block_size,
                from_text=is_from_text(engine_input),
            )
            if getattr(request, "echo", False):  # Requests of some routes have none.
                refuse_echo(engine_input, gem_config)

    completion, chat = OnlineRenderer.preprocess_completion, OnlineRenderer.preprocess_chat
    _expect_parameters(completion, "prompts-of-requests", "request", "prompt_input")
    _expect_parameters(chat, "prompts-of-requests", "request", "messages")

    @functools.wraps(completion)
    async def preprocess_completion(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        asked = asked_for(request.model_extra or {}, self.model_config, "compress", "embed")
        engine_inputs = await completion(self, request, *args, **kwargs)
        gem_config = _remembered(self)
        if gem_config is not None and "compress" in asked:
            for engine_input in engine_inputs:
                compress_prompt(engine_input, gem_config)
        check(self, request, engine_inputs)
        return engine_inputs

    @functools.wraps(chat)
    async def preprocess_chat(
        self: Any, request: Any, messages: Any, *args: Any, **kwargs: Any
    ) -> Any:
        conversation, engine_inputs = await chat(self, request, messages, *args, **kwargs)
        if not conversation:
            refuse_options_of(messages)
        check(self, request, engine_inputs)
        return conversation, engine_inputs

    OnlineRenderer.preprocess_completion = preprocess_completion
    OnlineRenderer.preprocess_chat = preprocess_chat


def _patch_embedding_with_answer() -> None:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    from gem_vllm.plugin.prompt_embedding import answer_with_embeddings, copy_to_render
    from gem_vllm.plugin.request_options import asked_for

    def wrapped(original: Callable[..., Any], render: str, *allowed: str) -> Callable[..., Any]:
        _expect_parameters(original, "embedding-with-answer", "request", "raw_request")

        @functools.wraps(original)
        async def create(self: Any, request: Any, raw_request: Any = None) -> Any:
            asked = asked_for(request.model_extra or {}, self.model_config, *allowed)
            if "embed" not in asked:
                return await original(self, request, raw_request)
            rendered = await getattr(self, render)(copy_to_render(request))
            if isinstance(rendered, ErrorResponse):
                return rendered
            return await answer_with_embeddings(
                self,
                rendered[1] if isinstance(rendered, tuple) else rendered,
                request,
                raw_request,
                lambda: original(self, request, raw_request),
            )

        return create

    for owner, create, render, allowed in (
        (OpenAIServingChat, "create_chat_completion", "render_chat_request", ("embed",)),
        (
            OpenAIServingCompletion,
            "create_completion",
            "render_completion_request",
            ("compress", "embed"),
        ),
    ):
        _expect(
            hasattr(owner, render), "embedding-with-answer", f"{owner.__name__} has no {render}"
        )
        setattr(owner, create, wrapped(getattr(owner, create), render, *allowed))


def _patch_interval_of_embeddings() -> None:
    from vllm.v1.engine.output_processor import RequestState

    original = RequestState.from_new_request
    _expect_parameters(original, "interval-of-embeddings", "request", "stream_interval")

    @functools.wraps(original)
    def from_new_request(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        if state.detokenizer is None:
            state.stream_interval = 1
        return state

    RequestState.from_new_request = from_new_request


def _patch_aborted_embeddings() -> None:
    from vllm.v1.engine import FinishReason, output_processor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    process, make = OutputProcessor.process_outputs, RequestState.make_request_output
    _expect_parameters(process, "aborted-embeddings", "engine_core_outputs")
    _expect_parameters(make, "aborted-embeddings", "pooling_output", "finish_reason")
    nothing = output_processor.EMPTY_CPU_TENSOR
    error = None
    if "error" in inspect.signature(make).parameters:  # vLLM 0.31 knows none.
        from vllm.outputs import RequestError

        error = RequestError(
            code="aborted", message="The embedding was aborted. Send it again.", retryable=True
        )
    without_result = (FinishReason.ABORT, FinishReason.ERROR)

    @functools.wraps(process)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs:
            if output.finish_reason in without_result and output.pooling_output is None:
                state = self.request_states.get(output.request_id)
                if state is not None and state.detokenizer is None:
                    output.pooling_output = nothing
        return process(self, engine_core_outputs, *args, **kwargs)

    @functools.wraps(make)
    def make_request_output(
        self: Any,
        new_token_ids: Any,
        pooling_output: Any,
        finish_reason: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if error is not None and pooling_output is nothing and finish_reason in without_result:
            kwargs["error"] = kwargs.get("error") or error
        return make(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)

    OutputProcessor.process_outputs = process_outputs
    RequestState.make_request_output = make_request_output


def _patch_texts_to_judge() -> None:
    from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring

    from gem_vllm.plugin.validation import refuse_spelled

    original = ServingGenerativeScoring._build_prompts
    _expect_parameters(original, "texts-to-judge", "request", "tokenizer")

    @functools.wraps(original)
    async def _build_prompts(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        gem_config = _remembered(self)
        if gem_config is not None:
            for part in (request.query, *request.items):
                refuse_spelled(part, gem_config)
        return await original(self, request, *args, **kwargs)

    ServingGenerativeScoring._build_prompts = _build_prompts


def _patch_rows_without_lora() -> None:
    from vllm.lora.ops.torch_ops import lora_ops
    from vllm.lora.punica_wrapper import punica_cpu

    def without_rows_of_none(name: str) -> Callable[..., None]:
        original = getattr(lora_ops, name)
        _expect_parameters(
            original,
            "rows-without-lora",
            "inputs",
            "lora_b_weights",
            "output_tensor",
            "lora_indices_tensor",
        )
        _expect(
            getattr(punica_cpu, name) is original,
            "rows-without-lora",
            f"the CPU's LoRA layers use another {name}",
        )

        @functools.wraps(original)
        def product(
            inputs: Any,
            lora_b_weights: Any,
            output_tensor: Any,
            lora_indices_tensor: Any,
            *args: Any,
            **kwargs: Any,
        ) -> None:
            inputs = inputs.masked_fill((lora_indices_tensor < 0).unsqueeze(1), 0)
            original(inputs, lora_b_weights, output_tensor, lora_indices_tensor, *args, **kwargs)

        return product

    wrapped = {name: without_rows_of_none(name) for name in ("bgmv_shrink", "bgmv_expand")}
    for name, product in wrapped.items():
        setattr(lora_ops, name, product)
        setattr(punica_cpu, name, product)


def _patch_draft_vocabulary() -> None:
    from vllm.config import SpeculativeConfig

    from gem_vllm.plugin.drafter import lacks_special_tokens_only

    original = SpeculativeConfig.verify_equal_vocab_size_if_draft_model
    _expect(
        "get_vocab_size" in inspect.getsource(original),
        "draft-vocabulary",
        "SpeculativeConfig.verify_equal_vocab_size_if_draft_model does not look at vocabularies",
    )

    @functools.wraps(original)
    def verify_equal_vocab_size_if_draft_model(self: Any) -> None:
        target, draft = self.target_model_config, self.draft_model_config
        gem_config = None if target is None or draft is None else gem_config_of(target)
        if gem_config is None or not lacks_special_tokens_only(
            draft.get_vocab_size(), target.get_vocab_size(), gem_config.special_token_ids
        ):
            original(self)

    SpeculativeConfig.verify_equal_vocab_size_if_draft_model = (
        verify_equal_vocab_size_if_draft_model
    )


LEDGER = (
    Patch(
        name="config-hook",
        target="vllm.model_executor.models.config.MODELS_CONFIG_MAP",
        why="An out-of-tree architecture cannot say how its engine is to be configured; ours needs "
        "its own worker and scheduler.",
        needless_when="ModelRegistry.register_model takes a VerifyAndUpdateConfig class.",
        apply=_patch_config_hook,
    ),
    Patch(
        name="backend-of-later-models",
        target="vllm.v1.attention.backends.registry.register_backend",
        why="vLLM keeps which backend it has chosen for layers alike: in a process that has had a "
        "plain model, a GEM model of the same shape would get that one's attention, without the "
        "GEM mask.",
        needless_when="register_backend forgets the choices made before.",
        apply=_patch_backend_of_later_models,
    ),
    Patch(
        name="graphs-beside-pooling",
        target="vllm.config.VllmConfig.__post_init__",
        why="An engine whose model has a pooler config gets no full CUDA graphs, which decoding is "
        "slow without; embedding requests need one. So it is set when the graphs are chosen.",
        needless_when="that check looks at the runner type, which here is `generate`.",
        apply=_patch_graphs_beside_pooling,
    ),
    Patch(
        name="offline-pooling",
        target="vllm.entrypoints.pooling.offline.PoolingOfflineMixin",
        why="LLM.encode, LLM.embed and LLM.score look at the runner type, not at the tasks that "
        "the engine supports; and they take every output for one of theirs, also of requests that "
        "LLM.enqueue left in the engine.",
        needless_when="they check `'embed' in supported_tasks` alone, as the server does, and "
        "leave others' outputs to wait_for_completion.",
        apply=_patch_offline_pooling,
    ),
    Patch(
        name="embedding-inputs",
        target="vllm.entrypoints.pooling.base.io_processor.PoolingIOProcessor.render",
        why="Length checks and truncation of embedding inputs must leave room for the k special "
        "tokens; max_embed_len covers /v1/embeddings only. Long texts must be cut at their ends, "
        "which is vLLM's way for engines that only pool; one that generates cuts at the beginning. "
        "And an empty text must be refused, of which a tokenizer that adds BOS makes a prompt.",
        needless_when="PoolerConfig.max_embed_len applies to every pooling input, the task says at "
        "which side a text is cut, and empty texts are refused before they are tokenized.",
        apply=_patch_embedding_inputs,
    ),
    Patch(
        name="reserved-token-ids",
        target="vllm.v1.engine.input_processor.InputProcessor.process_inputs",
        why="User input must not spell GEM special tokens in text, nor hold them as ids but in "
        "whole runs.",
        needless_when="a model can register a validator of engine inputs.",
        apply=_patch_reserved_token_ids,
    ),
    Patch(
        name="prompts-of-requests",
        target="vllm.renderers.online_renderer.OnlineRenderer.preprocess_completion and its like "
        "for chats",
        why="A completion request may ask for its prompt to be read through special tokens; and "
        "what is refused has to be before a streamed answer begins, whose status is sent by the "
        "time that the engine sees the prompt. The renderer, which can be replaced, is not shown "
        "the request.",
        needless_when="renderers are given a request's own fields with its prompts.",
        apply=_patch_prompts_of_requests,
    ),
    Patch(
        name="embedding-with-answer",
        target="vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat"
        ".create_chat_completion and its like for completions",
        why="A chat or completion request may ask for its prompt's embedding beside the answer, "
        "which has a field of its own for it.",
        needless_when="a plugin can add fields to the answers of the OpenAI routes.",
        apply=_patch_embedding_with_answer,
    ),
    Patch(
        name="interval-of-embeddings",
        target="vllm.v1.engine.output_processor.RequestState.from_new_request",
        why="With --stream-interval, an option for chats, the first embedding fails an assertion "
        "in the loop that hands out answers: all requests fail, and the server ends.",
        needless_when="RequestState.make_request_output has an interval for generated tokens only.",
        apply=_patch_interval_of_embeddings,
    ),
    Patch(
        name="aborted-embeddings",
        target="vllm.v1.engine.output_processor.OutputProcessor.process_outputs and RequestState"
        ".make_request_output",
        why="An engine that is paused or put to sleep aborts what it works on; an aborted "
        "embedding fails an assertion in the loop that hands out answers: all requests fail, and "
        "the server ends. One that is aborted by its id is answered with an empty vector and 200; "
        "on vLLM 0.31, whose results have no errors, so are all that are aborted.",
        needless_when="the engine's abort of a pooling request has an error with it.",
        apply=_patch_aborted_embeddings,
    ),
    Patch(
        name="texts-to-judge",
        target="vllm.entrypoints.generate.generative_scoring.serving.ServingGenerativeScoring"
        "._build_prompts",
        why="/generative_scoring tokenizes its texts itself and hands on token ids: special tokens "
        "that are spelled in a text would hide from the model what is before them.",
        needless_when="its prompts are rendered by the renderer.",
        apply=_patch_texts_to_judge,
    ),
    Patch(
        name="rows-without-lora",
        target="vllm.lora.ops.torch_ops.lora_ops.bgmv_shrink and bgmv_expand",
        why="On a CPU the rows of requests without a LoRA, whose index is -1, get that of the last "
        "slot, as -1 is an index for torch: beside a chat with a LoRA embeddings come out wrong.",
        needless_when="vLLM's LoRA operations in torch leave rows of index -1 out, as its kernels "
        "for GPUs do.",
        apply=_patch_rows_without_lora,
    ),
    Patch(
        name="draft-vocabulary",
        target="vllm.config.SpeculativeConfig.verify_equal_vocab_size_if_draft_model",
        why="A draft model, which has the base's vocabulary, is refused beside a checkpoint, whose "
        "vocabulary has k tokens more.",
        needless_when="a draft's vocabulary may be smaller than the target's.",
        apply=_patch_draft_vocabulary,
    ),
)

_applied: set[str] = set()


def apply_all() -> None:
    """Apply every patch of the ledger, each once in a process.

    Raises:
        GemError: vLLM no longer has what a patch changes.
    """
    for patch in LEDGER:
        if patch.name in _applied:
            continue
        try:
            patch.apply()
        except (ImportError, AttributeError) as error:
            raise GemError(
                f"vLLM has moved under gem-vllm's patch '{patch.name}' ({patch.target}): {error}. "
                "Install a vLLM version that this gem-vllm supports."
            ) from error
        _applied.add(patch.name)
