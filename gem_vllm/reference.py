"""The reference: a GEM checkpoint on plain transformers, slow and obvious on purpose.

One text at a time, one forward pass over the whole sequence, one dense mask, eager attention. It
needs no vLLM, and it is what every faster path is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import DynamicCache

from gem_vllm.checkpoint import load_checkpoint
from gem_vllm.config import special_token
from gem_vllm.errors import GemError
from gem_vllm.mask import gem_mask


class ReferenceEmbedder:
    """Embeds and generates with a GEM checkpoint (arXiv 2506.04344, section 3 and appendix B).

    Works with any causal LM of transformers that takes a 4-D attention mask. T is the length of a
    sequence, k the number of special tokens.

    Attributes:
        model: the transformers model, with the adapter's LoRA layers in adapter mode.
        tokenizer: of the checkpoint.
        gem_config: of the checkpoint.
        max_length: tokens that fit the context, special tokens included.
    """

    def __init__(self, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Load the checkpoint in ``folder`` on the CPU, weights and computation in ``dtype``.

        Raises:
            GemConfigError: as `gem_vllm.checkpoint.load_checkpoint`.
        """
        model, self.tokenizer, self.gem_config = load_checkpoint(folder, dtype=dtype)
        self.model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model.requires_grad_(False)
        self.model.set_attn_implementation("eager")
        self.max_length: int = self.model.config.max_position_embeddings
        self._special_ids = list(self.gem_config.special_token_ids)
        self._at_special = torch.zeros(0, 1, dtype=dtype)
        for name, module in self.model.named_modules():
            if ".lora_B." in name:
                module.register_forward_hook(self._confine_lora)

    def embed(self, texts: Sequence[str] | Sequence[Sequence[int]]) -> Tensor:
        """Embed each text: its tokens, the special tokens, one forward pass, pooling, L2 norm.

        Where the checkpoint has an instruction, it goes between the text and the special tokens.

        Args:
            texts: n texts, or n lists of token ids without special tokens.

        Returns:
            float32 [n, d] of norm 1; d is the hidden size, or k times it with concat pooling.

        Raises:
            GemError: a text is empty, too long for the context, or names a special token.
        """
        if isinstance(texts, str):
            raise GemError("embed takes a list of texts, not one text; put it in a list")
        prompts = [self._prompt(text) for text in texts]
        size = self.gem_config.embedding_size(self.model.config.hidden_size)
        embeddings = torch.zeros(len(prompts), size)
        for row, prompt in zip(embeddings, prompts, strict=True):
            hidden = self.hidden_states(prompt + self._special_ids)[-self.gem_config.k :].float()
            pooled = hidden.mean(0) if self.gem_config.pooling == "mean" else hidden.flatten()
            row.copy_(nn.functional.normalize(pooled, dim=0))
        return embeddings

    @torch.inference_mode()
    def hidden_states(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """The last layer's hidden states, after the final norm, under the GEM mask.

        Args:
            token_ids: [T], with runs of special tokens anywhere, or none.

        Returns:
            [T, hidden] in the model's dtype.

        Raises:
            GemError: there are no ids, or one is outside the vocabulary.
        """
        inputs = self._inputs(self._checked(token_ids))
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int] | Tensor) -> Tensor:
        """Logits of the token that follows each position, under the GEM mask.

        Args:
            token_ids: [T], with runs of special tokens anywhere, or none.

        Returns:
            float32 [T, vocab]; -inf for the special tokens, which are never generated.

        Raises:
            GemError: there are no ids, or one is outside the vocabulary.
        """
        logits = self.model(**self._inputs(self._checked(token_ids))).logits[0].float()
        logits[:, self._special_ids] = -torch.inf
        return logits

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy decoding under the GEM mask; special tokens have logits of -inf.

        Args:
            prompt_ids: with runs of special tokens anywhere, or none.
            max_new_tokens: at most; fewer at an end-of-sequence token or where the context ends.

        Returns:
            The new ids, the end-of-sequence token included.

        Raises:
            GemError: there are no ids, or one is outside the vocabulary.
        """
        ids = self._checked(prompt_ids)
        new: list[int] = []
        while not self._finished(new, max_new_tokens, length=len(ids)):
            new.append(self._next_token(self._inputs(ids)))
            ids.append(new[-1])
        return new

    @torch.inference_mode()
    def decode_from_special_tokens(
        self, prefix_ids: Sequence[int], max_new_tokens: int
    ) -> list[int]:
        """Decode from the special tokens alone (appendix B).

        The prefix and the special tokens go in, everything but the special tokens' keys and values
        is dropped, and greedy decoding goes on from those, at the positions where it would be had
        nothing been dropped. The first token comes from the logits of the last special token.

        Args:
            prefix_ids: token ids without special tokens.
            max_new_tokens: as in `generate`.

        Returns:
            The new ids, the end-of-sequence token included.

        Raises:
            GemError: as `embed`.
        """
        prefix = self._prompt(prefix_ids)
        k = self.gem_config.k
        # Without a config no layer of the cache forgets keys outside its window by itself.
        cache = DynamicCache()
        kept, new = list(self._special_ids), list[int]()
        inputs = self._inputs(prefix + kept)
        while not self._finished(new, max_new_tokens, length=len(prefix) + len(kept)):
            token = self._next_token({**inputs, "past_key_values": cache, "use_cache": True})
            if not new:
                for layer in cache.layers:
                    layer.keys = layer.keys[..., -k:, :]
                    layer.values = layer.values[..., -k:, :]
            new.append(token)
            kept.append(token)
            inputs = self._inputs(kept, cached=len(kept) - 1, offset=len(prefix))
        return new

    def _prompt(self, text: str | Sequence[int]) -> list[int]:
        if text == "":  # of which a tokenizer that adds BOS makes a token
            raise GemError("a text is empty; give at least one character")
        ids = self._checked(self.tokenizer(text).input_ids if isinstance(text, str) else text)
        if any(i in self._special_ids for i in ids):
            raise GemError(
                f"a text has a special token ({special_token(0)} ...); take it out, special "
                "tokens are added by the embedder"
            )
        if len(ids) > (limit := self.gem_config.max_text_tokens(self.max_length)):
            raise GemError(
                f"a text has {len(ids)} tokens, and {limit} fit the context beside "
                f"{len(self.gem_config.appended_ids)} special tokens; shorten it"
            )
        return [*ids, *self.gem_config.instruction_ids]

    def _checked(self, token_ids: Sequence[int] | Tensor) -> list[int]:
        ids = list(map(int, token_ids))
        if not ids:
            raise GemError("a text is empty; give at least one token")
        if not 0 <= min(ids) <= max(ids) < self.model.config.vocab_size:
            raise GemError(f"token ids must be from 0 to {self.model.config.vocab_size - 1}")
        return ids

    def _inputs(self, ids: list[int], *, cached: int = 0, offset: int = 0) -> dict[str, Any]:
        """What one forward pass takes; marks the special positions for the LoRA.

        Args:
            ids: all tokens that are visible at all.
            cached: how many of them, from the start, are in the cache and not computed again.
            offset: position of the first id.
        """
        token_ids = torch.tensor(ids)
        special = torch.isin(token_ids[cached:], torch.tensor(self._special_ids))
        self._at_special = special.unsqueeze(-1).to(self.model.dtype)
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        layer_types = set(getattr(config, "layer_types", None) or ())
        if layer_types:
            mask: Any = {
                kind: self._bias(token_ids, window if kind == "sliding_attention" else None, cached)
                for kind in layer_types
            }
        else:
            mask = self._bias(token_ids, window, cached)
        return {
            "input_ids": token_ids[None, cached:],
            "position_ids": torch.arange(offset + cached, offset + len(ids))[None],
            "attention_mask": mask,
        }

    def _bias(self, token_ids: Tensor, window: int | None, cached: int) -> Tensor:
        """The mask as eager attention adds it to the scores: [1, 1, T - cached, T]."""
        visible = gem_mask(token_ids, self._special_ids, sliding_window=window)[cached:]
        bias = torch.zeros(visible.shape, dtype=self.model.dtype)
        return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)[None, None]

    def _next_token(self, inputs: dict[str, Any]) -> int:
        logits = self.model(**inputs, logits_to_keep=1).logits[0, -1].float()
        logits[self._special_ids] = -torch.inf
        return int(logits.argmax())

    def _finished(self, new: list[int], max_new_tokens: int, *, length: int) -> bool:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        ended = bool(new) and new[-1] in (*ends, self.tokenizer.eos_token_id)
        return ended or len(new) >= max_new_tokens or length >= self.max_length

    def _confine_lora(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Forward hook of every B of the LoRA: y = W x + (alpha / r) B A x at special positions."""
        return output * self._at_special
