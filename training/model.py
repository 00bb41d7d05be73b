"""What every training mode shares: the two losses over a language model with special tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gem_vllm.training import peers
from gem_vllm.training.losses import (
    info_nce,
    leading,
    lexical_loss,
    next_token_loss,
    next_token_total,
    pool,
)
from gem_vllm.training.sequences import IGNORE, next_token_targets

if TYPE_CHECKING:
    from gem_vllm.training.teacher import Teacher

# Of next-token prediction: 0.6 GB of float32 logits with a vocabulary of 150,000.
POSITIONS_AT_ONCE = 1024


class GemTrainingModel(nn.Module, ABC):
    """``L = (1 - alpha) L_ntp + alpha L_cl`` of a batch (arXiv 2506.04344, section 3.3).

    ``lm`` is the causal language model with its k special tokens; which of its parameters are
    trained is told by their ``requires_grad``. The temperature's logarithm is trained with them.
    ``rows_per_pass``: texts of the contrastive phase that are computed at once; None for all.
    ``matryoshka``: sizes of leading parts of an embedding that are embeddings, too: the contrastive
    loss is the mean over these and the whole (arXiv 2205.13147).
    ``teacher``: its cosines are taught in lexical batches beside those of words; None for the words
    alone.
    ``instruction_tokens``: how many there are between a text and its special tokens.
    ``in_step``: each process holds a part of the base, so all must make as many passes over it.
    """

    in_step: bool = False

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        special_ids: tuple[int, ...],
        pooling: str,
        *,
        scale: float,
        symmetric: bool,
        rows_per_pass: int | None = None,
        matryoshka: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.lm = lm
        self.special_ids = special_ids
        self.k = len(special_ids)
        self.pooling = pooling
        self.symmetric = symmetric
        self.rows_per_pass = rows_per_pass
        self.matryoshka = matryoshka
        self.teacher: Teacher | None = None
        self.instruction_tokens = 0
        self.log_temperature = nn.Parameter(torch.tensor(math.log(scale)))
        self.config = self.base.config.get_text_config()
        if getattr(self.config, "attn_logit_softcapping", None) is not None:
            self.base.set_attn_implementation("eager")  # no other has it with gradients

    @property
    def base(self) -> PreTrainedModel:
        """The causal language model itself, where PEFT wraps it too."""
        return self.lm.get_base_model() if isinstance(self.lm, PeftModel) else self.lm

    @abstractmethod
    def special_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Last hidden states (after the final norm) of the special tokens behind each text.

        token_ids: int64 [N, T], right-padded texts without special tokens; lengths: [N]; seen:
        bool [N, T], tokens that the special tokens see, None for all. Returns [N, k, hidden].
        """

    @abstractmethod
    def ordinary_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, predicting: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states under the GEM mask at positions that predict.

        token_ids: int64 [N, T], right-padded rows with or without special tokens; predicting: bool
        [N, T]. Returns [P, hidden], and bool [N, T] which of the positions these are: in row-major
        order, all those that any trained parameter acts on.
        """

    def embed(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Embeddings, float32 [N, d] of length 1, of texts as `special_states` takes them."""
        return pool(self.special_states(token_ids, lengths), self.pooling)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [P, hidden] to logits [P, V], softcapped where the base does."""
        logits = self.base.get_output_embeddings()(hidden)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def forward(
        self,
        alpha: torch.Tensor,
        cl_ids: torch.Tensor | None = None,
        cl_lengths: torch.Tensor | None = None,
        ntp_ids: torch.Tensor | None = None,
        ntp_lengths: torch.Tensor | None = None,
        cl_pairs: torch.Tensor | None = None,
        cl_seen: torch.Tensor | None = None,
        cl_repeats: torch.Tensor | None = None,
        lex_ids: torch.Tensor | None = None,
        lex_lengths: torch.Tensor | None = None,
        lex_similar: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """A batch of ``TrainBatches`` to ``loss``, and to its parts where they are computed.

        These are ``loss_ntp`` and, both weighed by alpha, ``loss_cl`` or ``loss_lex``.

        No suffix is computed, nor any logit, in the contrastive phase (alpha 1).
        """
        losses: dict[str, torch.Tensor] = {}
        total = alpha.new_zeros(())
        if ntp_ids is not None and ntp_lengths is not None:
            losses["loss_ntp"] = self.ntp_loss(ntp_ids, ntp_lengths)
            total = total + (1.0 - alpha) * losses["loss_ntp"]
        if cl_ids is not None and cl_lengths is not None:
            states = self._contrastive_states(cl_ids, cl_lengths, cl_seen)
            with torch.autocast(states.device.type, enabled=False):
                count = len(states) // 2 if cl_pairs is None else int(cl_pairs)
                by_size = [
                    info_nce(
                        part[:count],
                        part[count : 2 * count],
                        self.log_temperature,
                        symmetric=self.symmetric,
                        negatives=part[2 * count :],
                        repeats=cl_repeats,
                    )
                    for part in self._sizes(states)
                ]
                losses["loss_cl"] = torch.stack(by_size).mean()
            total = total + alpha * losses["loss_cl"]
        if lex_ids is not None and lex_lengths is not None and lex_similar is not None:
            states, its = self._lexical_states(lex_ids, lex_lengths)
            with torch.autocast(states.device.type, enabled=False):
                if self.teacher is not None and its is not None:
                    embeddings = pool(its, self.teacher.model.pooling)
                    cosines = embeddings @ peers.gather(embeddings).T
                    lex_similar = 0.5 * (lex_similar + cosines)
                by_size = [lexical_loss(part, lex_similar) for part in self._sizes(states)]
                losses["loss_lex"] = torch.stack(by_size).mean()
            total = total + alpha * losses["loss_lex"]
        return {"loss": total, **losses}

    def _sizes(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Embeddings of states [N, k, hidden], and their leading parts that are embeddings, too."""
        pooled = pool(states, self.pooling)
        return [leading(pooled, size) for size in (None, *self.matryoshka)]

    def _lexical_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`_contrastive_states`, and the teacher's of the same texts, where there is one."""
        its = None
        if self.teacher is not None:
            with torch.no_grad():
                its = self.teacher.model._contrastive_states(token_ids, lengths)
        return self._contrastive_states(token_ids, lengths), its

    def _contrastive_states(
        self, token_ids: torch.Tensor, lengths: torch.Tensor, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`special_states`, with ``rows_per_pass`` a part at a time.

        Of a part that is computed again in the backward pass nothing is kept but its input, so
        that memory does not grow with the batch (gradient caching, arXiv 2101.06983).
        """
        every = torch.arange(len(token_ids), device=token_ids.device)
        passes = [every] if self.rows_per_pass is None else self._parts(every, self.rows_per_pass)
        if len(passes) == 1:
            return self.special_states(token_ids, lengths, seen)
        states = []
        for rows in passes:
            computed = rows if len(rows) else every[:1]
            longest = int(lengths[computed].max())
            part = (
                token_ids[computed, :longest],
                lengths[computed],
                None if seen is None else seen[computed, :longest],
            )
            found = checkpoint(self.special_states, *part, use_reentrant=False)
            states.append(found[: len(rows)])
        return torch.cat(states)

    def _parts(self, rows: torch.Tensor, most: int) -> Sequence[torch.Tensor]:
        """Row numbers [n] in parts of at most ``most``.

        With ``in_step`` as many parts as in the process that has most of them, some maybe empty.
        """
        parts = math.ceil(len(rows) / most)
        if self.in_step:
            parts = peers.largest(parts, rows.device)
        return rows.tensor_split(parts)

    def ntp_loss(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Mixed next-token prediction of rows [N, T] with lengths [N]: a scalar.

        Logits are the largest tensors of all, so those of many positions are computed a part at a
        time, and again in the backward pass.
        """
        targets = next_token_targets(token_ids, lengths, self.special_ids, self.instruction_tokens)
        hidden, computed = self.ordinary_states(token_ids, lengths, targets != IGNORE)
        targets = targets[computed]
        if len(hidden) <= POSITIONS_AT_ONCE:
            return next_token_loss(self._ntp_total(hidden, targets), len(hidden))
        parts = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
        totals = [checkpoint(self._ntp_total, *part, use_reentrant=False) for part in parts]
        return next_token_loss(torch.stack(totals).sum(), len(hidden))

    def _ntp_total(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.logits(hidden)
        never = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        never[list(self.special_ids)] = True
        return next_token_total(logits.masked_fill(never, float("-inf")), targets)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What is trained, and nothing else: a checkpoint of a frozen base holds no base."""
        return {
            name: parameter.detach()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy back what ``state_dict`` gave; ValueError if it is not of a model like this one."""
        own = self.state_dict()
        if own.keys() != state_dict.keys():
            raise ValueError("the checkpoint holds other parameters than this run trains")
        for name, value in own.items():
            value.copy_(peers.sharded_like(value, state_dict[name]))
        return nn.modules.module._IncompatibleKeys([], [])
