"""Tiny random models of every supported family, made in a second: bases and GEM checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from gem_vllm.checkpoint import add_special_tokens, load_base, save_checkpoint
from gem_vllm.config import GemConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
# No further family: Mistral with a window in all of its layers, and no list of layers' types.
WINDOWED = "mistral-windowed"

_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    WINDOWED: MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma": GemmaConfig,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FAMILY_OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    WINDOWED: {"sliding_window": 16},
    "gemma2": {"query_pre_attn_scalar": 32, **_SLIDING},
    "gemma3": {"query_pre_attn_scalar": 32, **_SLIDING},
}

_CORPUS = (
    "The quick brown fox jumps over the lazy dog while the river runs past an old stone bridge.",
    "In 1969 the first people walked on the moon; they came back with twenty kilograms of rock.",
    "A library keeps books, maps and newspapers, and lends most of them to its readers for free.",
    "What is the capital of France? Paris is the capital of France, and its largest city too.",
    "Bread is made from flour, water, salt and yeast; baking it takes less than an hour.",
    "Naïve café owners in Zürich sell crème brûlée — très bien! 北京 and Москва are capitals.",
)

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tiny_base(family: str, folder: str | Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a random base: 2 layers, hidden 64, 2 heads of 32 and 1 KV head, about 500 tokens.

    Args:
        family: one of `FAMILIES`, or `WINDOWED`. Gemma 2 and 3 have a layer with a window of 16
            tokens, `WINDOWED` has two; Llama and the Gemmas tie the head to the embedding.
        folder: to write.
        seed: of the weights. They are larger than usual, so that attention is far from uniform.
        overrides: of the family's config, for example ``max_position_embeddings``.

    Returns:
        ``folder``; weights are float32.
    """
    folder = Path(folder)
    tokenizer = make_tiny_tokenizer(add_bos=family in ("llama", "gemma", "gemma2", "gemma3"))
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **_FAMILY_OPTIONS.get(family, {}),
        **overrides,
    }
    config = _CONFIGS[family](**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if family.startswith("gemma"):
        # Scaled by sqrt(hidden) and tied to the head, they would make every model repeat itself.
        model.get_input_embeddings().weight.data *= 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_checkpoint(
    family: str,
    folder: str | Path,
    *,
    k: int,
    pooling: str = "mean",
    train_mode: str = "adapter",
    seed: int = 0,
    instruction_ids: tuple[int, ...] = (),
    target_modules: str | tuple[str, ...] = "all-linear",
    base: str | Path | None = None,
    **overrides: Any,
) -> Path:
    """Save a GEM checkpoint with random special rows and, in adapter mode, a random LoRA of rank 4.

    Args:
        family: one of `FAMILIES`, or `WINDOWED`.
        folder: to write.
        k: number of special tokens.
        pooling: ``mean`` or ``concat``.
        train_mode: ``adapter``, ``full`` or ``lora``.
        seed: of the base, the rows and the LoRA.
        instruction_ids: between text and special tokens.
        target_modules: linear layers that the LoRA is on, as PEFT names them.
        base: folder of the base; made beside ``folder``, as ``<name>-base``, if it is left out.
        overrides: as in `make_tiny_base`.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    if base is None:
        base = make_tiny_base(
            family, folder.with_name(f"{folder.name}-base"), seed=seed, **overrides
        )
    model, tokenizer = load_base(base, dtype=torch.float32)
    ids = add_special_tokens(model, tokenizer, k)
    config = GemConfig(ids, pooling, train_mode, f"tiny-{family}", instruction_ids=instruction_ids)
    random = torch.Generator().manual_seed(seed + 1)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        rows = torch.randn(k, embedding.shape[1], generator=random)
        embedding[list(ids)] = rows * embedding.std()
    if train_mode == "adapter":
        named = target_modules if isinstance(target_modules, str) else list(target_modules)
        lora = LoraConfig(
            r=4, lora_alpha=8, target_modules=named, bias="none", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, lora)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.1)
    save_checkpoint(folder, model, tokenizer, config)
    return folder


@cache
def _trained_tokenizer() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def make_tiny_tokenizer(*, add_bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 500 tokens with a chat template."""
    tokenizer = Tokenizer.from_str(_trained_tokenizer())
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A",
            special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))],
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
    )
    wrapped.chat_template = _CHAT_TEMPLATE
    return wrapped


def make_tiny_eagle_head(method: str, folder: str | Path, base: str | Path) -> Path:
    """Save a random head for speculative decoding, of one layer, as EAGLE's authors publish theirs.

    Args:
        method: ``eagle`` or ``eagle3``.
        folder: to write.
        base: a Llama, whose vocabulary and sizes the head has.

    Returns:
        ``folder``.
    """
    folder = Path(folder)
    config = LlamaConfig.from_pretrained(base, num_hidden_layers=1, tie_word_embeddings=False)
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer, into_attention, fused = {
        "eagle": ("layers.0", hidden, 2 * hidden),
        "eagle3": ("midlayer", 2 * hidden, 3 * hidden),
    }[method]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, fused),
        f"{layer}.self_attn.q_proj.weight": (queries, into_attention),
        f"{layer}.self_attn.k_proj.weight": (keys, into_attention),
        f"{layer}.self_attn.v_proj.weight": (keys, into_attention),
        f"{layer}.self_attn.o_proj.weight": (hidden, queries),
        f"{layer}.mlp.gate_proj.weight": (inner, hidden),
        f"{layer}.mlp.up_proj.weight": (inner, hidden),
        f"{layer}.mlp.down_proj.weight": (hidden, inner),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
    }
    if method == "eagle3":
        norms = ("norm", f"{layer}.input_layernorm", f"{layer}.hidden_norm")
        shapes |= {f"{norm}.weight": (hidden,) for norm in norms}
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    random = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=random) * config.initializer_range
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    config.architectures = ["LlamaForCausalLM" if method == "eagle" else "LlamaForCausalLMEagle3"]
    # Its inputs are what three of the base's layers are given; a base usually has more than these.
    config.eagle_aux_hidden_state_layer_ids = [0, 1, 2]
    config.save_pretrained(folder)
    return folder
