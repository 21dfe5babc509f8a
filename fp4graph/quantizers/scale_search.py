"""Every legal scale for each group, the one with the least squared error wins.

For E4M3 the search keeps to a window of codes around the absmax scale (the idea of 2606.07618).
Below 2/5 of it clipping costs more than anything gained. Above twice of it the grid is coarser and
has no value that the halved scale lacks. The tests hold the window against all 126 codes. For E8M0
three powers of two are enough.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from fp4graph.formats.minifloat import E4M3
from fp4graph.quantizers.candidates import best_scales
from fp4graph.quantizers.four_over_six import LARGEST_SCALE

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

_E4M3_WINDOW = range(-11, 9)  # 8 codes are an octave
_E8M0_WINDOW = range(-1, 2)
_E4M3_CODES, _E8M0_CODES = (1, 126), (0, 254)


def scale_search(
    weight: Tensor, format: BlockFormat, importance_K: Tensor | None = None
) -> PackedWeight:
    """Round a weight with the best scale for each group.

    NVFP4's tensor scale is the better of two: the one of rounding to nearest, whose largest block
    scale is 448, and one that leaves room above it.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: NVFP4 or MXFP4.
        importance_K: what the squared error of each column counts, such as the mean square of its
            input; all alike if None.

    Raises:
        WeightError: see `BlockFormat.quantize`.
    """
    w_NGB, amax_NG = format.groups(weight)
    shape = (weight.shape[0], weight.shape[1])
    importance: Tensor | float = 1.0
    if importance_K is not None:
        padded_K = pad(importance_K.to(torch.float32), (0, w_NGB[0].numel() - len(importance_K)))
        importance = padded_K.reshape(w_NGB.shape[1:])
    if not format.has_per_tensor_scale:
        codes, _ = format.scale_codec.encode(amax_NG)
        candidates = around(codes, format)
        scale, _ = best_scales(w_NGB, candidates, None, format, importance)
        return format.pack(w_NGB, scale, None, shape)
    found = []
    for largest in (E4M3.max, LARGEST_SCALE):
        codes, per_tensor_scale = format.scale_codec.encode(amax_NG, largest)
        candidates = around(codes, format)
        scale, errors = best_scales(w_NGB, candidates, per_tensor_scale, format, importance)
        found.append((float(errors.double().sum()), scale, per_tensor_scale))
    _, scale, per_tensor_scale = min(found, key=lambda each: each[0])
    return format.pack(w_NGB, scale, per_tensor_scale, shape)


def around(codes: Tensor, format: BlockFormat) -> list[Tensor]:
    """Return candidates, the given codes first: they win where none is better."""
    e4m3 = format.has_per_tensor_scale
    steps = sorted(_E4M3_WINDOW if e4m3 else _E8M0_WINDOW, key=abs)
    legal = _E4M3_CODES if e4m3 else _E8M0_CODES
    return [(codes.to(torch.int16) + step).clamp(*legal).to(torch.uint8) for step in steps]
