"""The tensor's scale and the groups' in turn, each best for the other (2509.23202 section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.formats.minifloat import E2M1
from fp4graph.quantizers.candidates import best_scales
from fp4graph.quantizers.scale_search import around

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

_ROUNDS = 10
_ENOUGH = 1e-4  # relative gain of a round


def alternating_search(weight: Tensor, format: BlockFormat) -> PackedWeight:
    """Round a weight to NVFP4 with scales that a tensor's scale of their own choice serves.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: NVFP4.

    Raises:
        WeightError: see `BlockFormat.quantize`.
    """
    w_NGB, amax_NG = format.groups(weight)
    codes, per_tensor_scale = format.scale_codec.encode(amax_NG)
    assert per_tensor_scale is not None
    best = torch.inf
    for _ in range(_ROUNDS):
        codes, errors = best_scales(w_NGB, around(codes, format), per_tensor_scale, format)
        total = float(errors.double().sum())
        if total > (1 - _ENOUGH) * best:
            break
        best, found = total, (codes, per_tensor_scale)
        per_tensor_scale = _best_tensor_scale(w_NGB, codes, per_tensor_scale, format)
    return format.pack(w_NGB, *found, (weight.shape[0], weight.shape[1]))


def _best_tensor_scale(
    w_NGB: Tensor, codes_NG: Tensor, per_tensor_scale: Tensor, format: BlockFormat
) -> Tensor:
    """Return the factor that brings the rounded values nearest to the weight."""
    codec = format.scale_codec
    up_NG1 = codec.reciprocal(codes_NG, per_tensor_scale)[..., None]
    one = torch.ones_like(per_tensor_scale)
    unscaled_NGB = E2M1.round(w_NGB * up_NG1) * codec.decode(codes_NG, one)[..., None]
    power = unscaled_NGB.double().square().sum()
    if float(power) == 0:
        return per_tensor_scale
    return ((unscaled_NGB.double() * w_NGB).sum() / power).to(per_tensor_scale.dtype)
