"""Block-diagonal Hadamard rotation: x H and W H give the same product as x and W (2509.23202).

It spreads what is large over a block, so that a group's scale fits more of its values: good for
MXFP4's powers of two where activations are rounded too, bad for NVFP4 weights rounded to nearest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROTATIONS = (16, 32, 64, 128)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate the last dimension in blocks by Sylvester's matrix over the root of its size.

    Twice is where it was. The fast transform: log2(block) additions a value, in an order that is
    part of the meaning, so that every kernel's bits are these.

    Args:
        x: [..., K], K a multiple of the block; computed in float32 or better.
        block: one of `ROTATIONS`.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    # [block, ...]: long rows are added faster
    y = wide.reshape(-1, block).T.clone(memory_format=torch.contiguous_format)
    half = 1
    while half < block:
        pairs = y.unflatten(0, (-1, 2, half))
        a, b = pairs[:, 0], pairs[:, 1]
        total = a + b
        b.neg_().add_(a)
        a.copy_(total)
        half *= 2
    return (y.T * (1 / math.sqrt(block))).to(x.dtype).reshape(x.shape)
