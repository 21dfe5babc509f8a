"""A warpgroup turns x for the wgmma kernel: from memory's order to that of the MMA's K slots.

It costs no instruction: a thread loads 4 x 16 bytes, a quarter apart, and stores 4 x 16 bytes.
"""

# mypy: ignore-errors

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@triton.constexpr_function
def pairs_layout(tokens, gb):
    """Return the layout of int32 [tokens, 32 * gb]: 4 neighbours in each quarter to a thread."""
    registers = [[0, 1], [0, 2], [0, 8 * gb], [0, 16 * gb], *([[0, 8]] if gb == 2 else [])]
    lanes = [[0, 4]]
    rows = 1
    while len(lanes) < 5:
        lanes.append([rows, 0])
        rows *= 2
    warps = [[each if each < tokens else 0, 0] for each in (rows, 2 * rows)]
    rows *= 4
    while rows < tokens:
        registers.append([rows, 0])
        rows *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [tokens, 32 * gb])


@gluon.jit
def store_turned(ring, slot, words, TOKENS: gl.constexpr, GB: gl.constexpr):
    """Store int32 [TOKENS, 32 * GB] to GB slots of the ring, pair 8 * GB * q + p to 4p + q."""
    PLAIN: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    turned = words.reshape([TOKENS, 4, 8 * GB]).permute([0, 2, 1]).reshape([TOKENS, 32 * GB])
    if GB == 1:
        ring.index(slot)._reinterpret(gl.int32, [TOKENS, 32], PLAIN).store(turned)
    else:
        halves = gl.split(turned.reshape([TOKENS, 2, 32]).permute([0, 2, 1]))
        ring.index(slot)._reinterpret(gl.int32, [TOKENS, 32], PLAIN).store(halves[0])
        ring.index(slot + 1)._reinterpret(gl.int32, [TOKENS, 32], PLAIN).store(halves[1])
