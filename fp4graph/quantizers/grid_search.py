"""The scales of 2509.23202's released code: absmax, shrunk, by the errors to the power of 2.4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.formats.minifloat import E2M1, E4M3
from fp4graph.quantizers.candidates import best_scales

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

_STEPS = 100
_STEP = 0.008
_POWER = 2.4


def grid_search(weight: Tensor, format: BlockFormat) -> PackedWeight:
    """Round a weight to NVFP4 with the best of a hundred shrunk scales a group (FP-Quant's `mse`).

    The tensor's scale is that of rounding to nearest. The code compares unrounded scales and rounds
    the winner; here what is compared is what is stored.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: NVFP4.

    Raises:
        WeightError: see `BlockFormat.quantize`.
    """
    w_NGB, amax_NG = format.groups(weight)
    first, per_tensor_scale = format.scale_codec.encode(amax_NG)
    assert per_tensor_scale is not None
    scale_NG = amax_NG / E2M1.max / per_tensor_scale
    shrunk = (scale_NG * (1 - _STEP * step) for step in range(1, _STEPS))
    candidates = [first, *(E4M3.encode(each.clamp(min=E4M3.smallest)) for each in shrunk)]
    scale, _ = best_scales(w_NGB, candidates, per_tensor_scale, format, power=_POWER)
    return format.pack(w_NGB, scale, per_tensor_scale, (weight.shape[0], weight.shape[1]))
