"""Adapter mode: a LoRA that acts at special positions only, in three passes over a frozen base.

1. The prefix, by the base alone and without gradients, leaves its keys and values.
2. The k special tokens, with the LoRA, read those and themselves.
3. Where a suffix is to be predicted: the suffix, by the base, reads the special tokens' keys and
   values and itself. Gradients pass through it to what acts in pass 2.

So the LoRA is confined to special positions by construction, and the backward pass touches k
tokens a text (and a suffix). ``gem_vllm.reference`` computes the same in one pass under one dense
mask; the tests hold the two together.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from gem_vllm.errors import GemError
from gem_vllm.training import peers
from gem_vllm.training.attention import grouped
from gem_vllm.training.masks import layer_masks, special_mask, suffix_mask
from gem_vllm.training.model import GemTrainingModel
from gem_vllm.training.prefix import Prefix, SomeRows, last_mlp_left_out

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LORA_MODULES = {"all": ATTENTION + MLP, "attention": ATTENTION, "mlp": MLP}

# Texts of like length share a forward pass, so that little of it is spent on padding. A GPU waits
# for the next pass to be launched rather than for padding.
TEXTS_PER_PASS = {"cpu": 16, "cuda": 128}


class AdapterModel(GemTrainingModel):
    """A frozen base; trained are the k special tokens' embedding rows, the LoRA, the temperature.

    ``lm`` is a PEFT model as ``add_adapter`` makes it, or, to compute with it alone, as
    `gem_vllm.checkpoint.load_checkpoint` gives it.
    """

    lm: PeftModel

    def train(self, mode: bool = True) -> AdapterModel:
        """The base computes as it does in use, without dropout; so does the LoRA."""
        return super().train(False)

    def special_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.special_pass(self.prefix_pass(token_ids, lengths), lengths, seen)

    def _lexical_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A teacher of the same base reads the prefixes that are there already."""
        teacher = self.teacher
        if teacher is None or not teacher.same_prefixes or self.rows_per_pass is not None:
            return super()._lexical_states(token_ids, lengths)
        prefix = self.prefix_pass(token_ids, lengths)
        with torch.no_grad():
            its = cast(AdapterModel, teacher.model).special_pass(prefix, lengths)
        return self.special_pass(prefix, lengths), its

    def ordinary_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, predicting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Suffixes and the token before each: nothing trained acts on raw text or a prefix."""
        rows = (token_ids == self.special_ids[0]).any(dim=1).nonzero().flatten()
        most = peers.largest(len(rows), rows.device) if self.in_step else len(rows)
        if len(rows):
            return self._suffix_states(token_ids, lengths, predicting, rows)
        nothing = torch.zeros_like(predicting)
        if not most:
            return self._special_embeds()[:0], nothing  # with a gradient (of zero)
        # Other processes make the three passes: along with them, over a row that predicts nothing.
        row = token_ids.new_tensor([[0, *self.special_ids, 0]])
        length = lengths.new_tensor([row.shape[1]])
        unpredicted = torch.zeros_like(row, dtype=torch.bool)
        hidden, _ = self._suffix_states(row, length, unpredicted, length.new_zeros(1))
        return hidden, nothing

    def _suffix_states(
        self,
        token_ids: torch.Tensor,
        lengths: torch.Tensor,
        predicting: torch.Tensor,
        rows: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`ordinary_states` by the three passes, over ``rows``, those with special tokens."""
        starts = (token_ids[rows] == self.special_ids[0]).int().argmax(dim=1)
        ends = starts + self.k
        computed = torch.zeros_like(predicting)
        position = torch.arange(token_ids.shape[1], device=token_ids.device)
        computed[rows] = predicting[rows] & (position >= ends[:, None] - 1)
        prefixes = token_ids[rows, : int(starts.max())]
        own = DynamicCache()
        special = self.special_pass(self.prefix_pass(prefixes, starts), starts, own=own)
        offsets = torch.arange(int((lengths[rows] - ends).max()) + 1, device=token_ids.device) - 1
        columns = ends[:, None] + offsets
        real = columns < lengths[rows, None]
        columns = columns.where(real, 0)
        suffixes = token_ids[rows[:, None], columns[:, 1:]]
        hidden = torch.cat([special[:, -1:], self._suffix_pass(suffixes, ends, own)], dim=1)
        return hidden[computed[rows[:, None], columns] & real], computed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The base's own head."""
        with self.lm.disable_adapter():
            return super().logits(hidden)

    # -- the three passes ----------------------------------------------------------------------

    @torch.no_grad()
    def prefix_pass(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> Prefix:
        """Pass 1: every layer's keys and values."""
        prefix = Prefix(len(self._decoder.layers), *token_ids.shape)
        order = lengths.argsort(descending=True)
        with self.lm.disable_adapter(), last_mlp_left_out(self._decoder):
            for rows in self._parts(order, TEXTS_PER_PASS[token_ids.device.type]):
                computed = rows if len(rows) else order[-1:]
                longest = int(lengths[computed].max())
                self._decoder(
                    input_ids=token_ids[computed, :longest],
                    past_key_values=SomeRows(prefix, computed),
                    use_cache=True,
                )
        return prefix

    def special_pass(
        self,
        prefix: Prefix,
        lengths: torch.Tensor,
        seen: torch.Tensor | None = None,
        own: DynamicCache | None = None,
    ) -> torch.Tensor:
        """Pass 2: hidden states [N, k, hidden] of the special tokens.

        prefix: of pass 1, left as it is; own: takes up the special tokens' keys and values.
        """
        offsets = torch.arange(self.k, device=lengths.device)
        embeds = self._special_embeds()
        with grouped(self.base):
            output = self._decoder(
                inputs_embeds=embeds.expand(len(lengths), -1, -1),
                attention_mask=layer_masks(
                    self.config,
                    embeds.dtype,
                    lambda window: special_mask(lengths, prefix.length, self.k, window, seen),
                ),
                position_ids=lengths[:, None] + offsets,
                past_key_values=own,
                use_cache=own is not None,
                prefix=prefix,
            )
        return output.last_hidden_state

    def _suffix_pass(
        self, suffix_ids: torch.Tensor, starts: torch.Tensor, special: DynamicCache
    ) -> torch.Tensor:
        """Pass 3: hidden states [N, n, hidden] of suffixes that begin at positions ``starts``."""
        length = suffix_ids.shape[1]
        with self.lm.disable_adapter():
            return self._decoder(
                input_ids=suffix_ids,
                attention_mask=layer_masks(
                    self.config,
                    special.layers[0].keys.dtype,
                    lambda window: suffix_mask(length, self.k, window, device=suffix_ids.device),
                ),
                position_ids=starts[:, None] + torch.arange(length, device=starts.device),
                past_key_values=special,
                use_cache=True,
            ).last_hidden_state

    # -- the base ------------------------------------------------------------------------------

    @property
    def _decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def _special_embeds(self) -> torch.Tensor:
        """Input embeddings [k, hidden] of the special tokens: trained rows, or a checkpoint's."""
        embedding: Any = self.base.get_input_embeddings()
        if not hasattr(embedding, "token_adapter"):
            return embedding(torch.tensor(self.special_ids, device=embedding.weight.device))
        rows, own = special_rows(self.lm), embedding.token_adapter.base_layer
        scale = getattr(own, "embed_scale", None)
        return (rows if scale is None else rows * scale).to(own.weight.dtype)


def add_adapter(
    model: PreTrainedModel,
    special_ids: tuple[int, ...],
    *,
    rank: int,
    alpha: int,
    modules: str = "all",
    last_layers: int | None = None,
) -> PeftModel:
    """Freeze ``model`` and give it a LoRA on linear layers and trainable special rows.

    modules: ``attention``, ``mlp``, or ``all`` linear layers; last_layers: of so many decoder
    layers, the last ones; None for all.
    """
    layers = model.config.get_text_config().num_hidden_layers
    if last_layers is not None and last_layers > layers:
        raise GemError(f"--lora-last-layers is {last_layers}; the base has {layers} layers")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=list(LORA_MODULES[modules]),
        layers_to_transform=last_layers and list(range(layers - last_layers, layers)),
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
