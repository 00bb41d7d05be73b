"""Adapter mode: a LoRA that acts at special positions only, in three passes over a frozen base.

1. The prefix, by the base alone and without gradients, leaves its keys and values.
2. The k special tokens, with the LoRA, read those and themselves.
3. Where a suffix is to be predicted: the suffix, by the base, reads the special tokens' keys and
   values and itself. Gradients pass through it to what acts in pass 2.

So the LoRA is confined to special positions by construction, and the backward pass touches k tokens
a text (and a suffix). ``gem_vllm.reference`` computes the same in one pass under one dense mask; the
tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from gem_vllm.training.model import GemTrainingModel

# Texts of like length share a forward pass, so that little of it is spent on padding.
TEXTS_PER_PASS = 16


class AdapterModel(GemTrainingModel):
    """A frozen base; trained are the k special tokens' embedding rows, the LoRA, the temperature.

    ``lm`` is a PEFT model as ``add_adapter`` makes it.
    """

    lm: PeftModel

    def __init__(
        self, lm: PeftModel, special_ids: tuple[int, ...], pooling: str, *, symmetric: bool
    ) -> None:
        super().__init__(lm, special_ids, pooling, symmetric=symmetric)
        self.config = lm.get_base_model().config.get_text_config()
        self.k = len(special_ids)

    def special_states(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        hidden, _ = self._special_pass(token_ids, lengths)
        return hidden

    def ordinary_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, predicting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Only suffixes: no trained parameter acts on raw text, nor on a prefix."""
        first_id = self.special_ids[0]
        rows = (token_ids == first_id).any(dim=1).nonzero().flatten()
        starts = (token_ids[rows] == first_id).int().argmax(dim=1)
        suffix_starts = starts + self.k
        suffix_lengths = lengths[rows] - suffix_starts
        computed = torch.zeros_like(predicting)
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        computed[rows] = predicting[rows] & (position >= suffix_starts[:, None])
        if not len(rows):
            return self.log_temperature.new_zeros(0, self.config.hidden_size), computed

        prefixes = token_ids[rows, : int(starts.max())]
        _, cache = self._special_pass(prefixes, starts)
        offsets = torch.arange(int(suffix_lengths.max()), device=token_ids.device)
        columns = (suffix_starts[:, None] + offsets).clamp(max=token_ids.shape[1] - 1)
        suffixes = token_ids[rows[:, None], columns]
        hidden = self._suffix_pass(suffixes, suffix_starts, cache)
        kept = computed[rows[:, None], columns] & (offsets < suffix_lengths[:, None])
        return hidden[kept], computed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        base = self.lm.get_base_model()
        with self._adapter_off():
            logits = base.get_output_embeddings()(hidden)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    # -- the three passes ----------------------------------------------------------------------

    @torch.no_grad()
    def prefix_pass(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> DynamicCache:
        """Pass 1: keys and values [N, heads, T, head_dim] of every layer, zero behind each text."""
        cache = DynamicCache()
        order = lengths.argsort(descending=True)
        with self._adapter_off():
            for rows in order.split(TEXTS_PER_PASS):
                longest = int(lengths[rows].max())
                part = DynamicCache()
                self._decoder(
                    input_ids=token_ids[rows, :longest], past_key_values=part, use_cache=True
                )
                for index, layer in enumerate(part.layers):
                    if index == len(cache.layers):
                        shape = list(layer.keys.shape)
                        shape[0], shape[2] = token_ids.shape
                        cache.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape), index)
                    cache.layers[index].keys[rows, :, :longest] = layer.keys
                    cache.layers[index].values[rows, :, :longest] = layer.values
        return cache

    def _special_pass(
        self, prefix_ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, DynamicCache]:
        """Pass 2: hidden states [N, k, hidden] of the special tokens, and the cache with them."""
        cache = self.prefix_pass(prefix_ids, lengths)
        offsets = torch.arange(self.k, device=lengths.device)
        rows = special_rows(self.lm)
        scale = getattr(self._embedding.base_layer, "embed_scale", None)
        embeds = (rows if scale is None else rows * scale).to(self._embedding.base_layer.weight.dtype)
        output = self._decoder(
            inputs_embeds=embeds.expand(len(prefix_ids), -1, -1),
            attention_mask=self._masks(
                lambda window: special_mask(lengths, prefix_ids.shape[1], self.k, window)
            ),
            position_ids=lengths[:, None] + offsets,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state, cache

    def _suffix_pass(
        self, suffix_ids: torch.Tensor, starts: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """Pass 3: hidden states [N, n, hidden] of suffixes that begin at positions ``starts``."""
        special = DynamicCache()
        for index, layer in enumerate(cache.layers):
            special.update(layer.keys[:, :, -self.k :], layer.values[:, :, -self.k :], index)
        length = suffix_ids.shape[1]
        with self._adapter_off():
            return self._decoder(
                input_ids=suffix_ids,
                attention_mask=self._masks(
                    lambda window: suffix_mask(length, self.k, window).to(suffix_ids.device)
                ),
                position_ids=starts[:, None] + torch.arange(length, device=starts.device),
                past_key_values=special,
                use_cache=True,
            ).last_hidden_state

    # -- the base ------------------------------------------------------------------------------

    @property
    def _decoder(self) -> nn.Module:
        return self.lm.get_base_model().get_decoder()

    @property
    def _embedding(self) -> Any:
        return self.lm.get_base_model().get_input_embeddings().token_adapter

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        with self.lm.disable_adapter():
            yield

    def _masks(self, visible: Any) -> torch.Tensor | dict[str, torch.Tensor]:
        """Additive 4-D masks, in the form in which this base takes them.

        ``visible(window)`` gives bool [N or 1, Q, K] for full attention (None) or for a window.
        """
        config, dtype = self.config, self._embedding.base_layer.weight.dtype

        def additive(window: int | None) -> torch.Tensor:
            seen = visible(window)[:, None]
            return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
                ~seen, torch.finfo(dtype).min
            )

        window = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ())
        if not layer_types:
            return additive(window)
        return {
            kind: additive(window if kind == "sliding_attention" else None) for kind in layer_types
        }


def special_mask(
    lengths: torch.Tensor, longest: int, k: int, window: int | None
) -> torch.Tensor:
    """What special tokens see of [prefix | special]: bool [N, k, longest + k].

    The text's own tokens (within the window that ends where the run starts), and itself.
    """
    position = torch.arange(longest, device=lengths.device)
    seen = position < lengths[:, None]
    if window is not None:
        seen &= position > lengths[:, None] - window
    own = torch.eye(k, dtype=torch.bool, device=lengths.device).expand(len(lengths), -1, -1)
    return torch.cat([seen[:, None].expand(-1, k, -1), own], dim=2)


def suffix_mask(length: int, k: int, window: int | None) -> torch.Tensor:
    """What a suffix sees of [special | suffix]: bool [1, length, k + length], causal."""
    query = torch.arange(length)[:, None] + k
    key = torch.arange(k + length)
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return seen[None]


def add_adapter(
    model: PreTrainedModel, special_ids: tuple[int, ...], *, rank: int, alpha: int
) -> PeftModel:
    """Freeze ``model`` and give it a LoRA on all linear layers and trainable special rows."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        trainable_token_indices=list(special_ids),
    )
    lm = get_peft_model(model, config)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return lm


def special_rows(lm: PeftModel) -> nn.Parameter:
    """The trained embedding rows of the special tokens: [k, hidden], in the order of their ids."""
    embedding: Any = lm.get_base_model().get_input_embeddings()
    return embedding.token_adapter.trainable_tokens_delta["default"]


@torch.no_grad()
def break_symmetry(model: PreTrainedModel, special_ids: tuple[int, ...], *, seed: int) -> None:
    """Start the special tokens as different rows, distributed as the base's own are.

    Equal rows would stay nearly equal, and k tokens would learn no more than one.
    """
    weight = model.get_input_embeddings().weight
    base = weight[: min(special_ids)].float()
    noise = torch.randn(
        len(special_ids), weight.shape[1], generator=torch.Generator().manual_seed(seed)
    ).to(weight.device)
    weight[list(special_ids)] = (base.mean(0) + base.std(0) * noise).to(weight.dtype)
