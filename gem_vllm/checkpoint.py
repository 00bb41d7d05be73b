"""The GEM checkpoint: a Hugging Face model folder with special tokens and ``gem_config``.

Whatever trains, serves, evaluates or exports reads and writes this one form. Safetensors only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gem_vllm.adapter import (
    ADAPTER_FOLDER,
    Adapter,
    check_plain_lora,
    plain_architecture,
    read_lora,
    with_base,
    write_checkpoint,
    write_configs,
)
from gem_vllm.config import MAX_SPECIAL_TOKENS, GemConfig, special_token
from gem_vllm.errors import GemConfigError, first_line
from gem_vllm.folders import read_json, written_whole
from gem_vllm.tokens import append_tokens, load_tokenizer, write_tokenizer
from gem_vllm.weights import EMBEDDING, read_tensor, weight_files, weights_size

__all__ = [
    "add_special_tokens",
    "load_base",
    "load_checkpoint",
    "save_checkpoint",
]

_DELTA = "token_adapter.trainable_tokens_delta"


def load_base(
    folder: str | Path, *, dtype: torch.dtype, weights: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base model: an ordinary Hugging Face folder with safetensors weights.

    Args:
        folder: local folder.
        dtype: of the model in memory.
        weights: False leaves them where they are: the model is on the meta device.

    Returns:
        The model, on the CPU and in evaluation mode, and its tokenizer.

    Raises:
        GemConfigError: no such folder, an architecture that is not supported (by name), a GEM
            checkpoint, a quantized model, other weights than safetensors, or weights that are
            missing.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if "gem_config" in config:
        raise GemConfigError(f"{folder} is a GEM checkpoint already; name the base it came from")
    plain_architecture(config)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise GemConfigError(
            f"{folder} is quantized ({method}); name the model that it was made from, whose "
            "weights are bfloat16, float16 or float32"
        )
    if weights:
        return _load(folder, dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_hf_config(folder), dtype=dtype)
    return model.eval(), load_tokenizer(folder)


def add_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, k: int
) -> tuple[int, ...]:
    """Add ``<|gem_0|>`` ... ``<|gem_{k-1}|>`` to the tokenizer, and rows to the model for them.

    The embedding (and the head) grow only where the base has no spare rows. The new embeddings are
    the mean of the base's with a little noise, always the same, so that no two are equal; an
    untied head's new rows are zero.

    Returns:
        The k ids, in order; they are tokenizer ids and rows of the embedding.

    Raises:
        GemConfigError: k is not from 1 to 64, or the tokenizer has such tokens already.
    """
    if not 1 <= k <= MAX_SPECIAL_TOKENS:
        raise GemConfigError(f"{k} special tokens asked for; give 1 to {MAX_SPECIAL_TOKENS}")
    first_new = len(tokenizer)
    ids = append_tokens(tokenizer, k)
    base_rows = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= base_rows:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        known = embedding[: min(base_rows, first_new)].float()
        noise = torch.randn(k, known.shape[1], generator=torch.Generator().manual_seed(0))
        fresh = known.mean(0) + 0.1 * known.std(0) * noise.to(known.device)
        if head is not embedding:
            head[base_rows:] = 0
            head[list(ids)] = 0
        embedding[base_rows:] = 0
        embedding[list(ids)] = fresh.to(embedding.dtype)
    return ids


def save_checkpoint(
    folder: str | Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    gem_config: GemConfig,
) -> None:
    """Write a GEM checkpoint, whole or not at all.

    In train mode ``adapter`` the base's tensors are copied from the folder that the model was
    loaded from, bit for bit and in their own dtype, whatever dtype the model has in memory. Of the
    model, only the special tokens' embeddings and the LoRA are written, in the dtype of the base's
    embedding. In the modes ``full`` and ``lora`` the model's weights are written as they are.

    Args:
        folder: to write; new, empty, or a GEM checkpoint, which is replaced.
        model: with special tokens, from `load_base` or `load_checkpoint`. In adapter mode the
            PeftModel around it, whose active adapter is a LoRA and may have
            ``trainable_token_indices``.
        tokenizer: with the special tokens; its chat template is kept.
        gem_config: what to write into ``config.json``. In adapter mode the base's architecture,
            vocabulary size and hash of weights are added.

    Raises:
        GemConfigError: the folder that the base was loaded from is gone, or the adapter is not a
            plain LoRA.
        GemError: ``folder`` holds something else, or the disk is too full.
    """
    folder = Path(folder)
    if gem_config.train_mode != "adapter":
        _save_weights(folder, model, tokenizer, gem_config)
        return
    if not isinstance(model, PeftModel):
        raise TypeError("train_mode 'adapter' needs a PeftModel")
    base = Path(model.get_base_model().name_or_path)
    _read_config(base)
    gem_config = with_base(gem_config, base)
    dtype = read_tensor(base, EMBEDDING).dtype
    taken = _take_adapter(model, gem_config, dtype)
    with written_whole(folder, weight_bytes=weights_size(base) + taken.nbytes) as new:
        write_checkpoint(new, base, tokenizer, gem_config, taken)


def load_checkpoint(
    folder: str | Path, *, dtype: torch.dtype
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, GemConfig]:
    """Load a GEM checkpoint.

    Args:
        folder: local folder.
        dtype: of the model in memory, its adapter included.

    Returns:
        The model, on the CPU and in evaluation mode: in train mode ``adapter`` the PeftModel,
        whose LoRA acts at *every* position until the caller confines it to special ones (as
        `gem_vllm.reference` does); else the plain model. Then the tokenizer and the gem_config.

    Raises:
        GemConfigError: no such folder, no or a wrong gem_config, or a part that is missing.
    """
    folder = Path(folder)
    plain_architecture(_read_config(folder))
    gem_config = GemConfig.from_pretrained(folder)
    lora = folder / ADAPTER_FOLDER
    if gem_config.train_mode == "adapter":
        read_lora(lora)
    model, tokenizer = _load(folder, dtype)
    tokens = [special_token(i) for i in range(gem_config.k)]
    if tuple(tokenizer.convert_tokens_to_ids(tokens)) != gem_config.special_token_ids:
        raise GemConfigError(
            f"the tokenizer of {folder} does not give {tokens[0]} ... the special_token_ids of "
            "gem_config; copy the checkpoint again, with its own tokenizer"
        )
    if gem_config.train_mode != "adapter":
        return model, tokenizer, gem_config
    peft_model = PeftModel.from_pretrained(model, str(lora), autocast_adapter_dtype=False)
    return peft_model.eval(), tokenizer, gem_config


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise GemConfigError(f"{folder} is not a folder; name a model folder on this machine")
    return read_json(folder / "config.json")


def _hf_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of a class of its own for values of a wrong type
        reason = " ".join(str(error).split())
        raise GemConfigError(f"{folder / 'config.json'} cannot be used: {reason}") from error


def _load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = folder.resolve()  # save_checkpoint reads the base again, from wherever it is run
    weight_files(folder)
    config = _hf_config(folder)
    tokenizer = load_tokenizer(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # what fails in transformers for a broken folder is of many classes
        raise GemConfigError(f"{folder} cannot be loaded: {first_line(error)}") from error
    if incomplete := sorted(info["missing_keys"]):
        raise GemConfigError(
            f"{folder} lacks {len(incomplete)} tensors ({incomplete[0]}, ...); copy or download "
            "the folder again"
        )
    return model.eval(), tokenizer


def _take_adapter(model: PeftModel, gem_config: GemConfig, dtype: torch.dtype) -> Adapter:
    """The active adapter of ``model``, in ``dtype`` and on the CPU."""
    name = model.active_adapter
    ids = list(gem_config.special_token_ids)
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    deltas = [state.pop(key) for key in list(state) if key.endswith(_DELTA)]
    rows = model.get_input_embeddings().weight[ids]
    config = model.peft_config[name].to_dict()
    if deltas:
        trained = config["trainable_token_indices"]
        trained = trained["embed_tokens"] if isinstance(trained, dict) else trained
        rows = deltas[0][[trained.index(i) for i in ids]]
    # Dropout is for training; what is loaded has none. The name is the base's, not a path.
    config.update(
        lora_dropout=0.0,
        trainable_token_indices=None,
        inference_mode=True,
        base_model_name_or_path=gem_config.base_model,
    )
    config = {
        key: sorted(config[key]) if isinstance(config[key], set) else config[key]
        for key in sorted(config)
    }
    check_plain_lora(config)
    lora = {key: tensor.detach().to("cpu", dtype) for key, tensor in state.items()}
    return Adapter(config, lora, rows.detach().to("cpu", dtype))


def _save_weights(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, gem_config: GemConfig
) -> None:
    if isinstance(model, PeftModel):
        raise TypeError("merge the adapter into the weights first (PeftModel.merge_and_unload)")
    size = sum(parameter.nbytes for parameter in model.parameters())
    with written_whole(folder, weight_bytes=size) as new:
        model.save_pretrained(new)
        write_tokenizer(new, tokenizer)
        config = read_json(new / "config.json")
        write_configs(new, config, gem_config, generation_config=new / "generation_config.json")
