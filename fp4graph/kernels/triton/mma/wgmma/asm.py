"""The inline assembly of the wgmma kernel: a tile's codes to the registers of operand A, scaled.

Costs as in `mma.asm`, without the products.
"""

# mypy: ignore-errors

import triton

from fp4graph.kernels.triton.mma.asm import code_lines, scale_lines


@triton.constexpr_function
def decode_asm(bits, mx, u):
    """Return the PTX that decodes a tile, 16 rows by 64 columns.

    Operands: 16 registers out (4i + a is register a of MMA i), 4 code words, a lane's scale words
    (4, of MXFP4 2), and the selector of `prmt` that takes a warp's word and turns it.
    """
    words = scale_words(mx)
    first, second = (20, 21) if mx else (20 + u, 22 + u)
    dtype = "bf16" if bits == "bfloat16" else "f16"
    lines = ["{ .reg .b32 t, m, s, w, lo, hi, nz, a<16>; .reg .b16 g, h; .reg .b8 q<4>;"]
    lines.append(f"prmt.b32 w, ${first}, ${second}, ${20 + words};")
    lines += scale_lines("w", 0, bits, mx)
    code = [f"${16 + i}" for i in range(4)]
    for i in range(4):
        a = [f"a{4 * i + j}" for j in range(4)]
        lines += code_lines(bits, code, i, a)
        for j in range(4):
            factor = "hi" if j % 2 else "lo"
            lines.append(f"mul.rn.{dtype}x2 ${4 * i + j}, {a[j]}, {factor};")
    return "\n".join(lines) + "}"


@triton.constexpr_function
def decode_constraints(mx):
    """Return the constraints of `decode_asm`'s operands."""
    return ",".join(["=&r"] * 16 + ["r"] * (4 + scale_words(mx) + 1))


@triton.constexpr_function
def scale_words(mx):
    """Return how many words of scales a lane has in a record."""
    return 2 if mx else 4


@triton.constexpr_function
def moves():
    """Return the PTX that makes operands of words; it vanishes."""
    return " ".join(f"mov.b32 ${i}, ${16 + i};" for i in range(16))


@triton.constexpr_function
def move_constraints():
    """Return the constraints of `moves`."""
    return ",".join(["=r"] * 16 + ["r"] * 16)
