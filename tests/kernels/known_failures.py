"""Compile what Triton 3.7 cannot and 3.8 can, in a process of its own: an assertion may end it.

    python known_failures.py cuda:sm_90 nvfp4|mxfp4

A product of bfloat16 with NVFP4 by `tl.dot_scaled`: with E4M3 scales it has no path but the native
one of both operands in FP4; with MXFP4's, which is here for comparison, it has. Were it mended, the
portable kernel could be much shorter.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import triton
import triton.language as tl
from kernels.offline import compile_launch

from fp4graph.formats import get_format
from fp4graph.kernels import parse_target


@triton.jit
def scaled_dot(x, w, scale, y, G: tl.constexpr):
    m = tl.arange(0, 64)
    k = tl.arange(0, 64)
    n = tl.arange(0, 64)
    byte = tl.arange(0, 32)
    a = tl.load(x + m[:, None] * 64 + k[None, :])
    b = tl.load(w + n[None, :] * 32 + byte[:, None])
    group = tl.arange(0, 64 // G)
    s = tl.load(scale + n[:, None] * (64 // G) + group[None, :])
    if G == 16:
        s = s.to(tl.float8e4nv, bitcast=True)
    c = tl.dot_scaled(a, None, "bf16", b, s, "e2m1")
    tl.store(y + m[:, None] * 64 + n[None, :], c)


if __name__ == "__main__":
    u8 = torch.zeros(64, 64, dtype=torch.uint8)
    args = (u8.bfloat16(), u8, u8, u8.float())
    keywords = {"G": get_format(sys.argv[2]).block_size, "num_warps": 4}
    compile_launch(scaled_dot, args, keywords, parse_target(sys.argv[1]))
