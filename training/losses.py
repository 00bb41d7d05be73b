"""The two losses of GEM and how they are weighed (arXiv 2506.04344, section 3).

Shapes: N rows of a batch, d the embedding's size, P predicting positions, V the vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from gem_vllm.training import peers
from gem_vllm.training.choices import AlphaSchedule

MAX_SCALE = 100.0
MAX_LOG_TEMPERATURE = math.log(MAX_SCALE)
LEXICAL_SCALE = 20.0


def pool(hidden: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool the last hidden states of the special tokens and L2-normalise, in float32.

    hidden: [N, k, hidden]. Returns [N, hidden] for ``mean`` and [N, k * hidden] for ``concat``.
    """
    hidden = hidden.float()
    pooled = hidden.mean(dim=1) if pooling == "mean" else hidden.flatten(1)
    return F.normalize(pooled, dim=-1)


def info_nce(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    log_temperature: torch.Tensor,
    *,
    symmetric: bool,
    negatives: torch.Tensor | None = None,
    repeats: torch.Tensor | None = None,
) -> torch.Tensor:
    """InfoNCE over a batch: row i's positive is row i, every other row is a negative.

    anchors, positives: [N, d], float32, L2-normalised; negatives: [M, d], further ones for all
    anchors. log_temperature: scalar lambda, clamped to [0, log 100]; the similarity is the cosine
    times exp(lambda). ``symmetric`` averages both directions (ours); otherwise anchors look for
    their positives (the paper). repeats: bool [N, positives and negatives of all processes], what
    is no negative of a row (`positives.shared_texts`). Returns a scalar: the mean over this
    process's rows, among those of all processes (`peers`).
    """
    scale = log_temperature.clamp(0.0, MAX_LOG_TEMPERATURE).exp()
    target = torch.arange(len(anchors), device=anchors.device) + peers.rank() * len(anchors)
    candidates = peers.gather(positives)
    if negatives is not None:
        candidates = torch.cat([candidates, peers.gather(negatives)])
    found = scale * anchors @ candidates.T
    if repeats is not None:
        found = found.masked_fill(repeats, -torch.inf)
    loss = F.cross_entropy(found, target)
    if symmetric:
        back = scale * positives @ peers.gather(anchors).T
        if repeats is not None:
            back = back.masked_fill(repeats[:, : back.shape[1]], -torch.inf)
        loss = 0.5 * (loss + F.cross_entropy(back, target))
    return loss


def lexical_loss(embeddings: torch.Tensor, similar: torch.Tensor) -> torch.Tensor:
    """How far cosines of embeddings are from cosines of words (ours; `lexical`).

    embeddings: [N, d], float32, L2-normalised, of this process; similar: float32 [N, texts of all
    processes], -inf where a text is compared with itself. Each row, times ``LEXICAL_SCALE``, is a
    distribution over the other texts. Returns a scalar: the mean over the rows of the divergence
    of the embeddings' from the words' (Kullback and Leibler).
    """
    itself = similar == -torch.inf
    found = LEXICAL_SCALE * embeddings @ peers.gather(embeddings).T
    found = found.masked_fill(itself, torch.finfo(found.dtype).min).log_softmax(dim=1)
    wanted = (LEXICAL_SCALE * similar).softmax(dim=1)
    return F.kl_div(found, wanted, reduction="batchmean")


def leading(embeddings: torch.Tensor, size: int | None) -> torch.Tensor:
    """The first ``size`` numbers of each embedding, L2-normalised again; None for all.

    embeddings: [N, d], float32, L2-normalised. What a request with ``dimensions`` gets.
    """
    return embeddings if size is None else F.normalize(embeddings[:, :size], dim=-1)


def next_token_total(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in float32, summed over positions. logits: [P, V]; targets: int64 [P]."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def next_token_loss(total: torch.Tensor, positions: int) -> torch.Tensor:
    """The mean over all positions that predict, of their sum.

    Zero (with a gradient of zero) where nothing is predicted. Of several processes (`peers`), the
    mean of what they return is the mean over all positions.
    """
    of_all = peers.total(torch.tensor(positions, device=total.device))
    return total * peers.count() / of_all.clamp(min=1)


def alpha_at(step: int, schedule: AlphaSchedule, *, value: float, switch_step: int) -> float:
    """The weight alpha of ``L = (1 - alpha) L_ntp + alpha L_cl`` at a step (counted from 0).

    ``step``: 0 before ``switch_step`` and ``value`` from there on (the paper: 1 from step 100);
    ``linear``: a ramp from 0 to ``value`` over ``switch_step`` steps; ``constant``: ``value``.
    """
    if schedule == "constant":
        return value
    if schedule == "step":
        return value if step >= switch_step else 0.0
    return value * min(step / max(switch_step, 1), 1.0)
