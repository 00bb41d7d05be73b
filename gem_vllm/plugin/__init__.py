"""The vLLM plugin: one engine that embeds and generates.

| module | what it adds to vLLM | by which hook |
|---|---|---|
| `models` | `Gem<Base>ForCausalLM`, made from vLLM's own classes | `ModelRegistry.register_model` |
| `config` | one-engine settings for a GEM checkpoint | patch `config-hook` |
| `scheduler` | special tokens behind the prompt, step counts | `scheduler_config.scheduler_cls` |
| `compress` | chat messages that are read through special tokens | `RENDERER_REGISTRY` |
| `prompt_embedding` | a prompt's embedding with its answer | patch `embedding-with-answer` |
| `request_options` | what a request asks for with `gem` | called by `compress` and `patches` |
| `validation` | refusal of bad requests | patches of what reads requests |
| `worker`, `runner`, `runner_v2` | embedding requests in generating batches | `worker_cls` |
| `runner_mixin`, `batch`, `step`, `frames` | what both runners share | called by them |
| `runs`, `attention`, `cpu_`, `flash_`, `flex_attention` | the mask, paged | `register_backend` |
| `lora` | the adapter at special positions | the linear layers' `quant_method` |
| `drafter` | drafts without special tokens | patch `draft-vocabulary`, and the runners |
| `last_layer` | its MLP, for the rows that are read alone | wrapped by `models` |
| `pooler` | special tokens' hidden states to an embedding | called by `batch` |
| `embeddings_output` | embeddings that are still on the GPU | called by the runners |
| `metrics` | Prometheus metrics by task, and of step kinds | `vllm.stat_logger_plugins` |
| `patches` | the ledger of what has no public hook | see there |
"""

from __future__ import annotations


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM calls it in every one of its processes.

    Raises:
        GemError: this vLLM is outside the supported range.
    """
    from gem_vllm.compat import check_vllm_version
    from gem_vllm.config import SUPPORTED_ARCHITECTURES
    from gem_vllm.plugin import patches

    check_vllm_version()

    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY

    supported = ModelRegistry.get_supported_archs()
    for architecture in SUPPORTED_ARCHITECTURES.values():
        if architecture not in supported:
            ModelRegistry.register_model(architecture, f"gem_vllm.plugin.models:{architecture}")
    # Not `register`, which warns of what it replaces, in every process.
    RENDERER_REGISTRY.renderers["hf"] = ("gem_vllm.plugin.compress", "GemHfRenderer")
    patches.apply_all()
