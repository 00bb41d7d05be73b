"""`Gem<Base>ForCausalLM`: vLLM's own model class, an adapter at special positions, masked logits.

The classes are made on first use (module `__getattr__`), so that serving a Llama does not import
the other families.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.v1.sample.logits_processor import LOGITSPROCS_GROUP

from gem_vllm.adapter import ADAPTER_FOLDER
from gem_vllm.config import SUPPORTED_ARCHITECTURES, GemConfig, base_architecture
from gem_vllm.plugin.attention import register_attention
from gem_vllm.plugin.last_layer import LastLayerMLP, wrap_last_mlp
from gem_vllm.plugin.lora import attach_adapter

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class GemCausalLM(_Base):
    """What a GEM model adds to the vLLM class that follows it in the MRO.

    Attributes:
        logits_rows: int64 [n] rows whose logits the next `compute_logits` call needs, all others
            belong to embedding requests; None for every row. The runner sets it for each step,
            `compute_logits` uses it once.
        last_mlp: the last layer's MLP, of which the runner says which rows are read; None where
            ordinary LoRAs are served, where a pipeline has another rank for that layer, and with
            vLLM 0.31's pass for sequence parallelism.
    """

    logits_rows: torch.Tensor | None = None
    last_mlp: LastLayerMLP | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        register_attention()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.gem_config = GemConfig.from_hf_config(vllm_config.model_config.hf_config)
        self._vllm_config = vllm_config
        model_config = vllm_config.model_config
        # Logits processors of users are given all rows, also those that are sampled for nobody.
        by_users = model_config.logits_processors or entry_points(group=LOGITSPROCS_GROUP)
        self._width_of_none = model_config.get_vocab_size() if by_users else 1

    def process_weights_after_loading(self) -> None:
        """vLLM's hook after loading: attach the adapter, where there is one; wrap the last MLP."""
        if self.gem_config.train_mode == "adapter":
            attach_adapter(self, self._vllm_config, _adapter_folder(self._vllm_config))
        special_ids = torch.tensor(
            self.gem_config.special_token_ids, device=self._vllm_config.device_config.device
        )
        self.register_buffer("gem_special_ids", special_ids, persistent=False)
        # vLLM 0.31's pass for sequence parallelism looks for that MLP's all-reduce in the graph.
        parted = getattr(self._vllm_config.compilation_config.pass_config, "enable_sp", False)
        plain = self._vllm_config.lora_config is None and not parted
        if plain and get_pp_group().is_last_rank:
            # An ordinary LoRA knows its layers by name, and its rows by those of the whole step.
            # As a plain attribute: it is a submodule elsewhere, and where `nn.Module` would keep it
            # the class's own None goes before.
            object.__setattr__(self, "last_mlp", wrap_last_mlp(self, self._vllm_config))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits with the special tokens at -inf: no sampling mode can emit them.

        Args:
            hidden_states: [rows, hidden].

        Returns:
            [rows, vocab]; zero in rows that `logits_rows` leaves out; [rows, 1] where it leaves
            out all of them, a step of embedding requests only, and nobody looks for a token's.
        """
        rows, self.logits_rows = self.logits_rows, None
        if rows is None:
            logits = self._generating_logits(hidden_states)
            if logits is None or logits.is_cuda or logits.dtype != torch.float32:
                return logits
            # Cut to a vocabulary that has grown by k they are strided. Of other types the sampler
            # makes float32, which is dense; these it takes as they are.
            return logits.contiguous()
        if len(rows) == 0:
            return hidden_states.new_zeros(len(hidden_states), self._width_of_none)
        logits = self._generating_logits(hidden_states[rows])
        if logits is None:
            return None
        spread = logits.new_zeros(len(hidden_states), logits.shape[-1])
        spread[rows] = logits
        return spread

    def _generating_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits.index_fill_(-1, self.gem_special_ids, -torch.inf)
        return logits


def _adapter_folder(vllm_config: VllmConfig) -> Path:
    """The checkpoint's adapter folder, fetched where the model is a Hugging Face repository."""
    model = vllm_config.model_config
    if Path(model.model).is_dir():
        return Path(model.model) / ADAPTER_FOLDER
    from huggingface_hub import snapshot_download

    root = snapshot_download(
        model.model,
        revision=model.revision,
        cache_dir=vllm_config.load_config.download_dir,
        allow_patterns=[f"{ADAPTER_FOLDER}/*"],
    )
    return Path(root) / ADAPTER_FOLDER


def __getattr__(name: str) -> type[nn.Module]:
    if name not in SUPPORTED_ARCHITECTURES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.model_executor.models.registry import ModelRegistry

    base = ModelRegistry._try_load_model_cls(base_architecture(name))
    if base is None:
        raise ImportError(f"this vLLM has no {base_architecture(name)}")
    model_class = type(name, (GemCausalLM, base), {"__module__": __name__})
    globals()[name] = model_class
    return model_class
