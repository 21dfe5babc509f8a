"""Rounds activations into codes and scales, as products of FP4 by FP4 or FP8 by FP8 want them.

Bit for bit what `BlockFormat.quantize_rows` gives. Needs the package `triton`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp4graph.kernels.triton import rounding_bodies as bodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Run = Callable[[Any], Any]

_COLUMNS = 1024  # of a row that a program takes at a time


def nvfp4(x_MK: Tensor, run: Run = lambda kernel: kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Return qdata uint8 [M, K/2], scale uint8 in tiles, per_tensor_scale float32 [1].

    Args:
        x_MK: [M, K], any float dtype but float64, rows contiguous, K a multiple of 16.
        run: what a kernel is launched by: itself, or an interpreter.
    """
    (M, K), stride = x_MK.shape, x_MK.stride(0)
    steps = -(-K // 64)
    largest = torch.zeros(1, dtype=torch.int32, device=x_MK.device)
    qdata = torch.empty((M, K // 2), dtype=torch.uint8, device=x_MK.device)
    scale = torch.zeros(-(-M // 128) * steps * 512, dtype=torch.uint8, device=x_MK.device)
    top = torch.empty(1, dtype=torch.float32, device=x_MK.device)
    grid = M, -(-K // _COLUMNS)
    run(bodies.largest_of_groups)[grid](x_MK, largest, K, stride, BLOCK=_COLUMNS)
    run(bodies.round_nvfp4)[grid](
        x_MK, largest, qdata, scale, top, K, stride, steps, BLOCK=_COLUMNS
    )
    return qdata, scale, top


def fp8(x_MK: Tensor, run: Run = lambda kernel: kernel) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [M, K] and scale float32 [M, 1]; arguments as in `nvfp4`, any K."""
    M, K = x_MK.shape
    codes = torch.empty((M, K), dtype=torch.uint8, device=x_MK.device)
    scale = torch.empty((M, 1), dtype=torch.float32, device=x_MK.device)
    run(bodies.round_fp8)[(M,)](x_MK, codes, scale, K, x_MK.stride(0), BLOCK=_COLUMNS)
    return codes, scale
