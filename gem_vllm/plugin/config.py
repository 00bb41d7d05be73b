"""Turns a GEM checkpoint's engine into one that embeds and generates."""

from __future__ import annotations

from pathlib import Path

import psutil
from vllm import envs
from vllm.config import (
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    PoolerConfig,
    SpeculativeConfig,
    VllmConfig,
)
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from gem_vllm.config import SUPPORTED_ARCHITECTURES, GemConfig
from gem_vllm.plugin.drafter import MODEL_METHODS, TEXT_METHODS

logger = init_logger(__name__)

WORKER = "gem_vllm.plugin.worker.GemWorker"
SCHEDULER = "gem_vllm.plugin.scheduler.GemScheduler"
CPU_KV_CACHE_BYTES = 4 << 30
CPU_BLOCK_SIZE = 32
CUDA_BACKENDS = (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.FLEX_ATTENTION)
# In vLLM's --additional-config; see `GemScheduler`.
TOKENS_BESIDE_CHAT = "gem_tokens_beside_chat"
PROMPTS_FILE = "config_sentence_transformers.json"
COHERE_INPUT_TYPES = ("search_document", "search_query", "classification", "clustering")


class GemModelConfig(VerifyAndUpdateConfig):
    """vLLM calls this once, in the front end, for every `Gem<Base>ForCausalLM`."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what cannot work, then set worker and scheduler.

        Raises:
            ValueError: an option that a GEM engine cannot honour; the message says which.
        """
        model_config = vllm_config.model_config
        gem_config = GemConfig.from_hf_config(model_config.hf_config)
        _refuse_unsupported(vllm_config, gem_config)

        model_config.hf_config.embedding_size = gem_config.embedding_size(
            model_config.get_hidden_size()
        )
        model_config.hf_config.is_matryoshka = True
        _take_input_types(model_config)
        vllm_config.parallel_config.worker_cls = WORKER
        vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        if current_platform.is_cuda():
            take_attention_backend(vllm_config)
        if current_platform.is_cpu():
            _bound_cpu_kv_cache(vllm_config)
            if gem_config.k > 1:
                _shrink_cpu_blocks(vllm_config.cache_config)

    @staticmethod
    def set_pooler(vllm_config: VllmConfig) -> None:
        """Let the engine take embedding requests; when all else is configured.

        To vLLM a model with a pooler config is one that only pools, and has no full CUDA graphs
        (patch `graphs-beside-pooling`).
        """
        vllm_config.model_config.pooler_config = PoolerConfig(task="embed")


def _take_input_types(model_config: ModelConfig) -> None:
    """Let `/v2/embed` take what Cohere's clients name with every text, where it has no prompts.

    vLLM knows an ``input_type`` by its prompt, the model's own or sentence-transformers'.
    """
    of_model = getattr(model_config.hf_config, "task_instructions", None)
    if not of_model:
        found = get_hf_file_to_dict(PROMPTS_FILE, model_config.model, model_config.revision) or {}
        of_model = found.get("prompts")
    if not of_model:
        model_config.hf_config.task_instructions = dict.fromkeys(COHERE_INPUT_TYPES, "")


def _refuse_unsupported(vllm_config: VllmConfig, gem_config: GemConfig) -> None:
    model_config = vllm_config.model_config
    if model_config.runner_type != "generate":
        raise ValueError(
            f"{model_config.model} is a GEM checkpoint: one engine embeds and generates. "
            "Start it without --runner and --convert."
        )
    if vllm_config.parallel_config.worker_cls not in ("auto", WORKER):
        raise ValueError("A GEM checkpoint brings its own worker. Leave --worker-cls unset.")
    if vllm_config.scheduler_config.scheduler_cls not in (None, SCHEDULER):
        raise ValueError("A GEM checkpoint brings its own scheduler. Leave --scheduler-cls unset.")
    if model_config.pooler_config is not None:
        raise ValueError("A GEM checkpoint says itself how it pools. Leave --pooler-config unset.")
    if model_config.skip_tokenizer_init:
        raise ValueError(
            "A GEM checkpoint's scores are of texts, which need a tokenizer. Leave "
            "--skip-tokenizer-init and --tokens-only unset: token ids are taken as they are."
        )
    from_modelscope = envs.VLLM_USE_MODELSCOPE and not Path(model_config.model).is_dir()
    if gem_config.train_mode == "adapter" and (model_config.model_weights or from_modelscope):
        raise ValueError(
            "An adapter is read from a folder or from the Hugging Face Hub. Download "
            f"{model_config.model_weights or model_config.model}, and serve that folder."
        )
    if vllm_config.speculative_config is not None:
        _refuse_drafts(vllm_config.speculative_config, vllm_config.parallel_config)
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError(
            "A GEM checkpoint's steps are not parted into microbatches. "
            "Leave --enable-dbo and --ubatch-size unset."
        )
    if getattr(vllm_config.parallel_config, "enable_batch_sharded_sampling", None):
        raise ValueError(
            "A GEM checkpoint's special tokens are masked in whole logits, which no rank has with "
            "batch-sharded sampling. Leave --enable-batch-sharded-sampling unset."
        )
    beside = vllm_config.additional_config.get(TOKENS_BESIDE_CHAT)
    if beside is not None and (type(beside) is not int or beside < 1):
        raise ValueError(
            f"{TOKENS_BESIDE_CHAT} in --additional-config is {beside!r}; give the number of prompt "
            "tokens, 1 or more, that a step may have beside requests that are being answered."
        )
    if beside is not None and not vllm_config.scheduler_config.enable_chunked_prefill:
        raise ValueError(
            f"{TOKENS_BESIDE_CHAT} in --additional-config is for prompts that are computed in "
            "chunks: a longer one would wait until no chat is answered. Leave one of "
            "--no-enable-chunked-prefill and it out."
        )
    if model_config.enable_prompt_embeds:
        raise ValueError(
            "A GEM checkpoint takes text and token ids only. Leave --enable-prompt-embeds unset."
        )
    if gem_config.max_text_tokens(model_config.max_model_len) < 1:
        raise ValueError(
            f"--max-model-len {model_config.max_model_len} leaves no room for text before the "
            f"{len(gem_config.appended_ids)} GEM special tokens. Give a greater one."
        )
    if vllm_config.kv_transfer_config is not None or vllm_config.cache_config.kv_offloading_size:
        raise ValueError(
            "Keys and values of a GEM checkpoint stay in its engine: a KV connector finds them by "
            "token ids, by which special tokens are found whose hidden states were never computed. "
            "Leave --kv-transfer-config and --kv-offloading-size unset."
        )
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        raise ValueError(
            "GEM checkpoints are served on vLLM's CPU and CUDA platforms only. Use a machine and a "
            "build of vLLM of these."
        )


def _refuse_drafts(speculative: SpeculativeConfig, parallel: ParallelConfig) -> None:
    methods = (*TEXT_METHODS, *MODEL_METHODS)
    if speculative.method not in methods:
        raise ValueError(
            f"Speculative decoding of a GEM checkpoint is by {', '.join(methods)}, not by "
            f"{speculative.method}. Give one of those as the method in --speculative-config."
        )
    draft = speculative.draft_model_config
    if speculative.method in MODEL_METHODS and (
        draft.architecture in SUPPORTED_ARCHITECTURES.values()
    ):
        raise ValueError(
            f"{draft.model} in --speculative-config is a GEM checkpoint. Give the base that it was "
            "trained on, or another ordinary model of the same vocabulary."
        )
    if current_platform.is_cpu() and parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "On a CPU vLLM has no speculative decoding in a pipeline, for any model: its workers "
            "fail. Leave --speculative-config or --pipeline-parallel-size unset."
        )


def take_attention_backend(vllm_config: VllmConfig) -> None:
    """A backend that has the GEM mask on CUDA: FlashAttention, FlexAttention where asked for.

    Raises:
        ValueError: another is asked for, or what they cannot do under the mask.
    """
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    if attention.backend is None:
        attention.backend = AttentionBackendEnum.FLASH_ATTN
    if attention.backend not in CUDA_BACKENDS:
        raise ValueError(
            f"On CUDA a GEM checkpoint runs on FLASH_ATTN, not on {attention.backend.name}. "
            "Leave --attention-backend unset, or give the slower FLEX_ATTENTION."
        )
    if attention.backend_per_kind:
        raise ValueError(
            "On CUDA a GEM checkpoint runs on one attention backend. Unset backend_per_kind."
        )
    if is_quantized_kv_cache(cache.cache_dtype):
        raise ValueError(
            f"On CUDA a GEM checkpoint's KV cache is not quantized ({cache.cache_dtype}). "
            "Leave --kv-cache-dtype unset."
        )
    parallel = vllm_config.parallel_config
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ValueError(
            "With context parallelism no rank has whole KV blocks, at which the GEM mask starts. "
            "Leave --decode-context-parallel-size and --prefill-context-parallel-size at 1."
        )


def _bound_cpu_kv_cache(vllm_config: VllmConfig) -> None:
    """Give the KV cache 4 GiB, or half of the free memory, where the user has not sized it.

    That is for all workers of the machine together. vLLM's own default asks for 92 % of its memory
    and does not start on one that is in use for anything else.
    """
    cache_config, parallel = vllm_config.cache_config, vllm_config.parallel_config
    sized = (
        cache_config.kv_cache_memory_bytes is not None
        or envs.VLLM_CPU_KVCACHE_SPACE
        or cache_config.gpu_memory_utilization != CacheConfig().gpu_memory_utilization
    )
    if not sized:
        free = psutil.virtual_memory().available
        workers = parallel.world_size * max(1, parallel.data_parallel_size_local)
        cache_config.kv_cache_memory_bytes = min(CPU_KV_CACHE_BYTES, free // 2) // workers
        logger.info(
            "KV cache: %.1f GiB a worker. Set --kv-cache-memory-bytes for another size.",
            cache_config.kv_cache_memory_bytes / (1 << 30),
        )


def _shrink_cpu_blocks(cache_config: CacheConfig) -> None:
    """KV blocks of 32 tokens instead of 128, the smallest that the CPU kernel takes.

    The special tokens' attention copies blocks (`gem_vllm.plugin.cpu_attention`); with short texts
    most of a large block is copied for nothing.
    """
    if not cache_config.user_specified_block_size:
        cache_config.block_size = CPU_BLOCK_SIZE
        # The platform, which is asked next, sets its own default unless the user has set one.
        cache_config.user_specified_block_size = True
