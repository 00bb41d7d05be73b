"""Which training model goes with a training mode."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

from gem_vllm.config import GemConfig
from gem_vllm.training.adapter_model import AdapterModel
from gem_vllm.training.dense_model import DenseModel
from gem_vllm.training.model import GemTrainingModel


def model_class(train_mode: str) -> type[GemTrainingModel]:
    """Of ``adapter``, ``full`` or ``lora``."""
    return AdapterModel if train_mode == "adapter" else DenseModel


def embedding_model(lm: PreTrainedModel | PeftModel, gem_config: GemConfig) -> GemTrainingModel:
    """What `gem_vllm.checkpoint.load_checkpoint` gives, to embed with in batches, not to train."""
    kind = model_class(gem_config.train_mode)
    model = kind(lm, gem_config.special_token_ids, gem_config.pooling, scale=1.0, symmetric=False)
    return model.requires_grad_(False)
