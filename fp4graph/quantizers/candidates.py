"""The best of several scales for each group, by the error of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.formats.minifloat import E2M1

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fp4graph.formats import BlockFormat

_SLAB_VALUES = 1 << 16  # values at a time, so that scratch stays in the cache


def best_scales(
    w_NGB: Tensor,
    candidates: Sequence[Tensor],
    per_tensor_scale: Tensor | None,
    format: BlockFormat,
    importance_GB: Tensor | float = 1.0,
    power: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Choose a scale for each group.

    Args:
        w_NGB: groups of values, float32.
        candidates: scale codes, uint8 [N, G] each; of equally good ones the first wins.
        per_tensor_scale: of the whole weight, or None.
        format: what codes mean.
        importance_GB: what the error of each column counts, or of all alike.
        power: that errors are raised to.

    Returns:
        the chosen codes, uint8 [N, G], and the error of each group, float32 [N, G].
    """
    chosen = torch.empty_like(candidates[0])
    errors = torch.empty(w_NGB.shape[:2], dtype=torch.float32, device=w_NGB.device)
    rows = max(1, _SLAB_VALUES // max(1, w_NGB[:1].numel()))
    for first in range(0, len(w_NGB), rows):
        slab = slice(first, first + rows)
        best = candidates[0][slab]
        least = _error(w_NGB[slab], best, per_tensor_scale, format, importance_GB, power)
        for each in candidates[1:]:
            error = _error(w_NGB[slab], each[slab], per_tensor_scale, format, importance_GB, power)
            better = error < least
            best, least = torch.where(better, each[slab], best), torch.where(better, error, least)
        chosen[slab], errors[slab] = best, least
    return chosen, errors


def _error(
    w_NGB: Tensor,
    codes_NG: Tensor,
    per_tensor_scale: Tensor | None,
    format: BlockFormat,
    importance_GB: Tensor | float,
    power: float,
) -> Tensor:
    codec = format.scale_codec
    up = codec.reciprocal(codes_NG, per_tensor_scale)[..., None]
    down = codec.decode(codes_NG, per_tensor_scale)[..., None]
    error = E2M1.round(w_NGB * up).mul_(down).sub_(w_NGB)
    raised = error.square() if power == 2 else error.abs() ** power
    return (raised * importance_GB).sum(-1)
