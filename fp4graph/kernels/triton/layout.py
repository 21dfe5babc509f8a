"""How a packed weight lies in a GPU's memory for the portable kernels: as torchao has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.formats import FP8

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import PackedWeight

_E8M0_NAN, _E4M3_NAN = 0xFF, 0x7F
_FP8_EXCESS = 256.0  # by which `decode_fp8` gives too little


def pack(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the kernels take.

    Returns:
        `qdata`, uint8 [N, Kp/2]; `scale`, uint8 [N, Kp/B], the sign of E4M3 cleared; `row_scale`,
        float32 [N], which multiplies a row's sum: the per-tensor scale, or for MXFP4 the row's
        largest block scale, that what is left fits float16. NaN where a block scale is. Of FP8
        `qdata` is [N, K], `scale` empty, and `row_scale` 2^8 of the row's, NaN where a code is.
    """
    if packed.format == FP8:
        broken = ((packed.qdata & 0x7F) == _E4M3_NAN).any(1)
        row_scale = (packed.scale[:, 0] * _FP8_EXCESS).masked_fill(broken, torch.nan)
        empty = packed.qdata.new_empty(len(packed.qdata), 0)
        return packed.qdata.contiguous(), empty, row_scale.contiguous()
    codes = packed.scale.view(torch.uint8)
    if packed.per_tensor_scale is not None:
        codes = codes & 0x7F
        row_scale = packed.per_tensor_scale.expand(len(codes))
        broken = codes == _E4M3_NAN
    else:
        broken = codes == _E8M0_NAN
        top = codes.masked_fill(broken, 0).to(torch.int32)
        top = top.amax(1) if codes.shape[1] else top.new_zeros(len(codes))
        row_scale = torch.ldexp(torch.ones_like(top, dtype=torch.float32), top - 127)
    row_scale = row_scale.masked_fill(broken.any(1), torch.nan)
    return packed.qdata.contiguous(), codes.contiguous(), row_scale.contiguous()
