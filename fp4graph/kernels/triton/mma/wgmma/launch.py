"""The host side of the wgmma kernel: descriptors and the launch. Needs the package `triton`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fp4graph.kernels.triton.launch import add_up
from fp4graph.kernels.triton.mma.layout import CODE_WORDS
from fp4graph.kernels.triton.mma.wgmma import bodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.kernels.triton.mma.layout import Order
    from fp4graph.kernels.triton.mma.wgmma.tile import Tile

_LANES = 128  # words of a row of shared memory


def multiply(
    x: Tensor,
    stream: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    order: Order,
    block_size: int,
    tile: Tile,
    run: Callable[[Any], Any],
) -> None:
    """Write x W^T + bias to y; all sums in float32, the same result at each call.

    Args:
        x: [M, 128 * steps] bfloat16 or float16, contiguous.
        stream: int32 [N/64, steps, record], from `layout.pack`.
        row_scale: float32 [N], as there.
        bias: [N], or None.
        y: [..., N], contiguous, M rows.
        order: of the stream's bits.
        block_size: B.
        tile: how to cut the work.
        run: as in `mma.launch.linear`.
    """
    (M, _), N, steps = x.shape, len(row_scale), stream.shape[1]
    codes, scales = _weight_descriptors(stream, block_size)
    flat = out = y.view(M, N)
    if tile.split > 1:
        out = torch.empty((tile.split, M, N), dtype=torch.float32, device=x.device)
    copies = tile.copies(N) and y.dtype == x.dtype
    rows = x.view(torch.int32) if tile.turns else _copied(turned(x, block_size), tile.tokens)
    some_bias = row_scale if bias is None else bias  # a pointer that is not read
    grid = -(-N // tile.rows), -(-M // tile.tokens), tile.split
    run(bodies.warpgroup_multiply)[grid](
        rows, x.shape[1] // 2, codes, scales, row_scale, some_bias,
        _copied(out, tile.tokens) if copies else out, M, N, steps,
        BITS=order.bits, G=block_size, HAS_BIAS=bias is not None,
        TOKENS=tile.tokens, BLOCKS=tile.blocks, SPLIT=tile.split, STAGES=tile.stages,
        TURN=tile.turns, DEEP=tile.is_deep, COPY_OUT=copies, num_warps=4,
    )  # fmt: skip
    if tile.split > 1:
        add_up(out, row_scale, bias, flat, run)


def turned(x: Tensor, block_size: int) -> Tensor:
    """Return x [M, K] with its pairs in the order of the MMA's slots; see `bodies`."""
    pairs = block_size // 2  # of a quarter
    return x.view(len(x), -1, 4, pairs, 2).transpose(2, 3).reshape(x.shape)


def _copied(matrix: Tensor, tokens: int) -> TensorDescriptor:
    """Describe [M, columns] for copies of [tokens, 64]."""
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor.from_tensor(matrix, [tokens, 64], layout)


def _weight_descriptors(
    stream: Tensor, block_size: int
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Describe the codes of records, [8, 128] words, and their scales, 128 words or halves."""
    blocks, steps, words = stream.shape
    records = blocks * steps
    flat = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    codes = TensorDescriptor(
        stream, [records, CODE_WORDS // _LANES, _LANES], [words, _LANES, 1],
        [1, CODE_WORDS // _LANES, _LANES], flat,
    )  # fmt: skip
    by_word = block_size // 16  # scales of a lane take 16 bytes of NVFP4, 8 of MXFP4
    all_scales = stream.view(torch.int32 if by_word == 1 else torch.int16).view(-1)
    flat = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32 // by_word, rank=2)
    scales = TensorDescriptor(
        all_scales[CODE_WORDS * by_word :], [records, _LANES], [words * by_word, 1], [1, _LANES],
        flat,
    )  # fmt: skip
    return codes, scales
