"""The host side of the fragment kernels. Needs the package `triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from fp4graph.kernels.triton.launch import add_up, as_matrix
from fp4graph.kernels.triton.mma import bodies, unpacking
from fp4graph.kernels.triton.mma.cut import Cut, Unpack
from fp4graph.kernels.triton.mma.kept import cut_for
from fp4graph.kernels.triton.mma.layout import COLUMNS, ROWS, Order
from fp4graph.kernels.triton.mma.wgmma import launch as wgmma
from fp4graph.kernels.triton.mma.wgmma.tile import Tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.kernels.target import Target

    Run = Callable[[Any], Any]


def linear(
    x: Tensor,
    stream: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    order: Order,
    block_size: int,
    target: Target,
    *,
    cut: Cut | Tile | Unpack | None = None,
    dtype: torch.dtype | None = None,
    run: Run = lambda kernel: kernel,
) -> Tensor:
    """Compute `x W^T + bias`, the same result at each call.

    By a cut or tile straight from the stream, all sums in float32; else the weight is unpacked to
    what `PackedWeight.dequantize` gives, and `F.linear` does the rest.

    Args:
        x: [..., K] bfloat16 or float16.
        stream: int32 [N/64, K/128, record], from `layout.pack`.
        row_scale: float32 [N], as there.
        bias: [N] in the dtype of x, or None.
        order: of the stream's bits.
        block_size: B.
        target: what it runs on.
        cut: how to do it; kept for this machine or chosen by size if None.
        dtype: of the result, but for unpacked weights; that of x if None.
        run: what a kernel is launched by: itself, or something that stands in for a GPU.

    Returns:
        [..., N].
    """
    rows = as_matrix(x)
    (M, K), N = rows.shape, len(row_scale)
    y = torch.empty((*x.shape[:-1], N), dtype=dtype or x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    cut = cut or cut_for(M, N, K, target)
    if isinstance(cut, Unpack):
        w = dequantize(stream, row_scale, K, x.dtype, order, block_size, run=run)
        return functional.linear(x, w, bias)
    steps = stream.shape[1]
    if steps * COLUMNS != K:
        rows = functional.pad(rows, (0, steps * COLUMNS - K))
    elif not rows.is_contiguous() or rows.storage_offset() % 2:
        rows = rows.clone(memory_format=torch.contiguous_format)
    if isinstance(cut, Tile):
        wgmma.multiply(rows, stream, row_scale, bias, y, order, block_size, cut, run)
        return y
    words = rows.view(torch.int32)  # two activations each
    out = y
    if cut.split > 1:
        out = torch.empty((cut.split, M, N), dtype=torch.float32, device=x.device)
    some_bias = row_scale if bias is None else bias  # a pointer that is not read
    options = {} if cut.most_registers is None else {"maxnreg": cut.most_registers}
    run(bodies.multiply)[(-(-N // cut.rows), cut.split, -(-M // (8 * cut.tokens)))](
        words, stream, row_scale, some_bias, out, M, N, steps, words.stride(0),
        BITS=order.bits, G=block_size, ARCH=target.capability, HAS_BIAS=bias is not None,
        TOKENS=cut.tokens, TILES=cut.tiles, WN=cut.wn, WK=cut.wk, SPLIT=cut.split, RING=cut.ring,
        num_warps=cut.wn * cut.wk, **options,
    )  # fmt: skip
    if cut.split > 1:
        add_up(out, row_scale, bias, y, run)
    return y


def dequantize(
    stream: Tensor,
    row_scale: Tensor,
    in_features: int,
    dtype: torch.dtype,
    order: Order,
    block_size: int,
    *,
    run: Run = lambda kernel: kernel,
) -> Tensor:
    """Return the dense weight [N, K], bit for bit what `PackedWeight.dequantize` gives.

    But for MXFP4 groups that count as 0, see `layout`.
    """
    N = len(row_scale)
    w = torch.empty((N, in_features), dtype=dtype, device=stream.device)
    if w.numel():
        run(unpacking.dequantize)[(-(-N // ROWS), stream.shape[1])](
            stream, row_scale, w, N, in_features, stream.shape[1],
            BITS=order.bits, G=block_size, LARGEST=torch.finfo(dtype).max,
        )  # fmt: skip
    return w
