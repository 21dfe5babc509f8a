"""torch's own linears of few bits, where a device has them: what ours are timed beside.

Only their time counts: weights and scales are made up. FP4 takes both sides in FP4, as W4A4 does,
without the time that it takes to round the activations.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fp4graph.gpu_check.device import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from fp4graph.kernels import Target

_FP8_SINCE = 89
_FP4_SINCE = 100
_MOST_INT4_ROWS = 64  # it is for decoding
_INT4_GROUP = 32


def torch_own(target: Target, x_MK: Tensor, n: int) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Yield what torch has for a device: its name, and what makes the call, or fails to."""
    rows, k = x_MK.shape
    capability = target.capability
    if not capability or x_MK.dtype != torch.bfloat16:
        return
    if rows <= _MOST_INT4_ROWS and k % 128 == 0 and n % 8 == 0:
        yield "torch int4", partial(_int4, x_MK, n)
    if capability >= _FP8_SINCE and k % 16 == 0 and n % 16 == 0:
        yield "torch fp8 W8A8", partial(_fp8, x_MK, n)
    if capability >= _FP4_SINCE and k % 128 == 0 and n % 32 == 0:
        yield "torch nvfp4 W4A4", partial(_nvfp4, x_MK, n)


def _int4(x_MK: Tensor, n: int) -> Call:
    k = x_MK.shape[1]
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device=x_MK.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    shape = k // _INT4_GROUP, n, 2
    scales = torch.randn(shape, dtype=torch.bfloat16, device=x_MK.device)
    op = torch.ops.aten._weight_int4pack_mm
    return Call("torch int4", lambda w, s: op(x_MK, w, _INT4_GROUP, s), (packed, scales))


def _fp8(x_MK: Tensor, n: int) -> Call:
    """W8A8, a scale a row of both sides."""
    k = x_MK.shape[1]
    dtype = torch.float8_e4m3fn
    codes = torch.randn(n, k, device=x_MK.device).to(dtype).view(torch.uint8)
    x = x_MK.to(dtype).view(torch.uint8)
    by_row = functional.ScalingType.RowWise
    of_x = torch.ones(len(x), 1, device=x.device), by_row
    of_w = torch.ones(1, n, device=x.device), by_row
    return _scaled("torch fp8 W8A8", x, codes, dtype, of_x, of_w)


def _nvfp4(x_MK: Tensor, n: int) -> Call:
    """W4A4 on FP4 tensor cores; its scales are all one, so that their order does not matter."""
    rows, k = x_MK.shape
    recipe: Any = functional.ScalingType.BlockWise1x16

    def side(count: int) -> tuple[Tensor, Tensor]:
        codes = torch.randint(256, (count, k // 2), dtype=torch.uint8, device=x_MK.device)
        scales = torch.ones(-(-count // 128) * 128 * (k // 16), device=x_MK.device)
        return codes, scales.to(torch.float8_e4m3fn)

    x, scale_x = side(rows)
    w, scale_w = side(n)
    swizzle = functional.SwizzleType.SWIZZLE_32_4_4
    return _scaled(
        "torch nvfp4 W4A4", x, w, torch.float4_e2m1fn_x2, (scale_x, recipe), (scale_w, recipe),
        swizzle_a=swizzle, swizzle_b=swizzle,
    )  # fmt: skip


def _scaled(
    name: str,
    x: Tensor,
    w: Tensor,
    dtype: torch.dtype,
    of_x: tuple[Tensor, Any],
    of_w: tuple[Tensor, Any],
    **how: Any,
) -> Call:
    """Return `F.scaled_mm` of bytes that are codes of a dtype, which not everything can copy."""

    def run(codes: Tensor) -> Tensor:
        a, b = x.view(dtype), codes.view(dtype).t()
        return functional.scaled_mm(a, b, *of_x, *of_w, output_dtype=torch.bfloat16, **how)

    return Call(name, run, (w,))
