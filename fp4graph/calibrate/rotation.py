"""Block-diagonal Hadamard rotation: x H and W H give the same product as x and W (2509.23202).

It spreads what is large over a block, so that a group's scale fits more of its values: good for
MXFP4's powers of two where activations are rounded too, bad for plain NVFP4 weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

ROTATIONS = (16, 32, 64, 128)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate the last dimension in blocks; twice is where it was.

    Args:
        x: [..., K], K a multiple of the block; computed in float32 or better.
        block: one of `ROTATIONS`.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    blocks: Tensor = wide.unflatten(-1, (-1, block))
    return (blocks @ _hadamard(block).to(wide)).flatten(-2).to(x.dtype)


@cache
def _hadamard(block: int) -> Tensor:
    """Return Sylvester's matrix over the root of its size, float64: symmetric, its own inverse."""
    h: Tensor = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return torch.div(h, block**0.5)
