"""Four over six: a group's largest value becomes 6 or 4, whichever errs less (2512.02010)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.formats.minifloat import E4M3
from fp4graph.quantizers.candidates import best_scales

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

LARGEST_SCALE = 256.0
"""What the largest block scale becomes, so that 1.5 times of it is below E4M3's 448."""


def four_over_six(weight: Tensor, format: BlockFormat) -> PackedWeight:
    """Round a weight to NVFP4 with the better of two scales a group.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: NVFP4.

    Raises:
        WeightError: see `BlockFormat.quantize`.
    """
    w_NGB, amax_NG = format.groups(weight)
    six, per_tensor_scale = format.scale_codec.encode(amax_NG, LARGEST_SCALE)
    assert per_tensor_scale is not None
    four = E4M3.encode(((amax_NG / 4) / per_tensor_scale).clamp(min=E4M3.smallest))
    scale, _ = best_scales(w_NGB, (six, four), per_tensor_scale, format)
    return format.pack(w_NGB, scale, per_tensor_scale, (weight.shape[0], weight.shape[1]))
