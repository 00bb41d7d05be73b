"""The GEM attention mask (arXiv 2506.04344, section 3; here with any number of runs).

A *run* is a maximal block of consecutive special tokens; b(i) is the start of the last run that
ended before position i, or 0. Position i sees j exactly when

1. j <= i, and
2. j >= b(i): behind a run, only the run itself and what follows it is visible, and
3. not (i and j are different special tokens of the same run).

So every row is one interval of columns and its own column, which is the form everything here is
computed from. Shapes: T is the length of the sequence, B the size of the batch, ``...`` any number
of leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def gem_intervals(
    token_ids: Tensor, special_ids: Sequence[int], *, sliding_window: int | None = None
) -> tuple[Tensor, Tensor]:
    """The mask by rows: position i sees the columns ``start[i] <= j < end[i]`` and itself.

    Args:
        token_ids: integer [..., T].
        special_ids: ids of the special tokens.
        sliding_window: W, for the layers of a base that see W tokens. An ordinary token i sees
            j > i - W. The tokens of a run share one window, that of its first: j > s - W, where s
            is the start of the run.

    Returns:
        start and end, int64 [..., T]. An ordinary token i ends at i, a special token at the start
        of its run.
    """
    return _intervals(_is_special(token_ids, special_ids), sliding_window)


def gem_mask(
    token_ids: Tensor,
    special_ids: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """The dense mask.

    Args:
        token_ids: integer [..., T].
        special_ids: ids of the special tokens.
        attention_mask: [..., T], 0 at padding, which may be on either side. Padding is nobody's
            column, whatever its id, and sees itself only (so that no row is empty).
        sliding_window: as in `gem_intervals`.

    Returns:
        bool [..., T, T], True where the row (query) sees the column (key).
    """
    special = _is_special(token_ids, special_ids)
    if attention_mask is not None:
        special &= attention_mask.bool()
    visible = interval_mask(*_intervals(special, sliding_window))
    if attention_mask is not None:
        real = attention_mask.bool()
        itself = torch.eye(real.shape[-1], dtype=torch.bool, device=real.device)
        visible &= (real.unsqueeze(-1) & real.unsqueeze(-2)) | itself
    return visible


def gem_mask_mod(
    token_ids: Tensor, special_ids: Sequence[int], *, sliding_window: int | None = None
) -> MaskMod:
    """The mask as FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)``.

    Args:
        token_ids: integer [B, T]; padding on the right needs nothing more, as no real row sees it.
        special_ids: ids of the special tokens.
        sliding_window: as in `gem_intervals`.
    """
    return interval_mask_mod(*gem_intervals(token_ids, special_ids, sliding_window=sliding_window))


def interval_mask(start: Tensor, end: Tensor) -> Tensor:
    """The dense mask of intervals.

    Args:
        start, end: integer [..., T], as of `gem_intervals`.

    Returns:
        bool [..., T, T], True where the row (query) sees the column (key).
    """
    column = torch.arange(start.shape[-1], device=start.device)
    inside = (column >= start.unsqueeze(-1)) & (column < end.unsqueeze(-1))
    return inside | (column == column.unsqueeze(-1))


def interval_mask_mod(start: Tensor, end: Tensor) -> MaskMod:
    """FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)`` of intervals.

    Args:
        start, end: integer [B, T], as of `gem_intervals`.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        inside = (kv_idx >= start[b, q_idx]) & (kv_idx < end[b, q_idx])
        return inside | (kv_idx == q_idx)

    return mask_mod


def _is_special(token_ids: Tensor, special_ids: Sequence[int]) -> Tensor:
    ids = torch.as_tensor(special_ids, dtype=token_ids.dtype, device=token_ids.device)
    return torch.isin(token_ids, ids)


def _intervals(special: Tensor, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """`gem_intervals` from the special positions, bool [..., T]."""
    position = torch.arange(special.shape[-1], device=special.device).expand(special.shape)
    if special.shape[-1] == 0:
        return position.clone(), position.clone()
    opens_run = special.clone()
    opens_run[..., 1:] &= ~special[..., :-1]
    # The start of the last run that began at or before each position; 0 before the first run.
    last_run = torch.where(opens_run, position, 0).cummax(-1).values
    end = torch.where(special, last_run, position)
    # A special token is still inside that run: what counts for it is the run before.
    start = torch.where(special, last_run.gather(-1, (end - 1).clamp(min=0)), last_run)
    if sliding_window is not None:
        start = torch.maximum(start, end - sliding_window + 1)
    return start, end
