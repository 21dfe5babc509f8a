"""The host side of the portable kernels: shapes, memory, launches. Needs the package `triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fp4graph.kernels.triton import bodies
from fp4graph.kernels.triton.tiles import MOST_ROWS, Tile, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.formats import BlockFormat

_REDUCE_COLUMNS = 256


def linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    format: BlockFormat,
    *,
    tile: Tile | None = None,
    programs: int = 1,
    dtype: torch.dtype | None = None,
    run: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Compute `x W^T + bias`, all sums in float32, the same result at each call.

    For more than 128 rows the weight is dequantised first, which else each tile of rows would do
    again, and `F.linear` does the rest.

    Args:
        x: [..., K] bfloat16 or float16.
        qdata: uint8 [N, Kp/2], of FP8 [N, K]; this and the next two are from `layout.pack`.
        scale: uint8 [N, Kp/B]; of FP8 it is not read.
        row_scale: float32 [N].
        bias: [N] in the dtype of x, or None.
        format: of the weight.
        tile: how to cut the work; chosen by size if None.
        programs: how many fill the device, for the choice.
        dtype: of the result; that of x if None.
        run: what a kernel is launched by: itself, or an interpreter.

    Returns:
        [..., N].
    """
    rows = as_matrix(x)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    (M, K), N, Kp = rows.shape, len(row_scale), qdata.shape[1] * 8 // format.bits
    y = torch.empty((*x.shape[:-1], N), dtype=dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if tile is None and M > MOST_ROWS:
        w = dequantize(qdata, scale, row_scale, K, x.dtype, format, run=run)
        return functional.linear(x, w, bias)
    tile = tile or choose(M, N, K, programs)
    out = y
    if tile.split > 1:
        out = torch.empty((tile.split, M, N), dtype=torch.float32, device=x.device)
    blocks = (M if tile.rows == 0 else -(-M // tile.rows), -(-N // tile.columns), tile.split)
    constants = {
        "E4M3": format.has_per_tensor_scale,
        "G": format.block_size,
        "HAS_BIAS": bias is not None,
        "SPLIT": tile.split,
        "BN": tile.columns,
        "BK": tile.depth,
        **({"BM": tile.rows} if tile.rows else {}),
    }
    kernel = run(bodies.gemm if tile.rows else bodies.gemv)
    some_bias = row_scale if bias is None else bias  # a pointer that is not read
    kernel[blocks](
        rows, qdata, scale, row_scale, some_bias, out, M, N, K, Kp, rows.stride(0),
        **constants, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    if tile.split > 1:
        add_up(out, row_scale, bias, y, run)
    return y


def as_matrix(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K], a view where that is possible; K may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def add_up(
    parts: Tensor, row_scale: Tensor, bias: Tensor | None, y: Tensor, run: Callable[[Any], Any]
) -> None:
    """Write to y what the raw sums [split, M, N] come to, always in the same order."""
    split, M, N = parts.shape
    run(bodies.reduce_parts)[(M, -(-N // _REDUCE_COLUMNS))](
        parts, row_scale, row_scale if bias is None else bias, y, M, N,
        HAS_BIAS=bias is not None, SPLIT=split, BN=_REDUCE_COLUMNS,
    )  # fmt: skip


def dequantize(
    qdata: Tensor,
    scale: Tensor,
    row_scale: Tensor,
    in_features: int,
    dtype: torch.dtype,
    format: BlockFormat,
    *,
    run: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Return the dense weight [N, K], bit for bit what `PackedWeight.dequantize` gives."""
    N, rows, columns = len(row_scale), 32, 128
    w = torch.empty((N, in_features), dtype=dtype, device=qdata.device)
    if w.numel():
        run(bodies.dequantize)[(-(-N // rows), -(-in_features // columns))](
            w, qdata, scale, row_scale, N, in_features, qdata.shape[1] * 8 // format.bits,
            E4M3=format.has_per_tensor_scale, G=format.block_size,
            LARGEST=torch.finfo(dtype).max, BN=rows, BK=columns,
        )  # fmt: skip
    return w
