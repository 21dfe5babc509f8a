"""The inline assembly of the fragment kernel: a tile's codes to registers, scaled, multiplied.

`layout` says which bits are what. Costs, in instructions of a lane for 8 weights: 8 to bring the
bits of bfloat16 into place, 9 of float16, 4 where the hardware converts; 4 products with the scale;
one `mma.sync` for 8 tokens.
"""

# mypy: ignore-errors

import triton

_NEGATIVE_ZERO = "0x80008000"


@triton.constexpr_function
def tile_asm(bits, mx, arch, tokens, words, pair):
    """Return the PTX that multiplies a tile, 16 rows by 64 columns, with `tokens` x 8 activations.

    Operands: 4*tokens sums out, the same in, 4 code words, `words` words of scales, of which `pair`
    is used, then 8 words of activations for each of `tokens`.
    """
    sums = 4 * tokens
    code = [f"${2 * sums + i}" for i in range(4)]
    scale = f"${2 * sums + 4 + pair // 2}"
    x = 2 * sums + 4 + words
    dtype = "bf16" if bits == "bfloat16" else "f16"
    lines = ["{ .reg .b32 t, m, s, lo, hi, nz, a<16>; .reg .b16 g, h; .reg .b8 q<4>;"]
    lines.append(f".reg .f32 c<{sums}>;")
    lines += scale_lines(scale, pair % 2, bits, mx)
    for i in range(4):
        a = [f"a{4 * i + j}" for j in range(4)]
        lines += code_lines(bits, code, i, a)
        for j in range(4):
            factor = "hi" if j % 2 else "lo"
            if dtype == "bf16" and arch < 90:  # sm_80 has no product of two bfloat16 alone
                lines.append(f"fma.rn.bf16x2 {a[j]}, {a[j]}, {factor}, nz;")
            else:
                lines.append(f"mul.rn.{dtype}x2 {a[j]}, {a[j]}, {factor};")
        for m in range(tokens):
            b = x + 8 * m + 2 * i
            out = ", ".join(f"c{4 * m + j}" for j in range(4))
            add = ", ".join(f"${sums + 4 * m + j}" for j in range(4)) if i == 0 else out
            lines.append(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
                f"{{{out}}}, {{{', '.join(a)}}}, {{${b}, ${b + 1}}}, {{{add}}};"
            )
    return "\n".join(lines + [f"mov.f32 ${j}, c{j};" for j in range(sums)]) + "}"


@triton.constexpr_function
def scale_lines(word, second, bits, mx):
    """PTX: a pair's two scales, each twice in a register: `lo` for rows g, `hi` for rows g + 8."""
    lines = []
    if second:
        lines.append(f"shf.l.wrap.b32 t, {word}, {word}, 8;")
        word = "t"
    if bits == "bfloat16" and not mx:  # exponent field 224 + e5: the scale times 2^119
        lines.append(f"lop3.b32 s, {word}, 0x0ff00ff0, 0x70007000, 0xea;")
    else:
        lines.append(f"and.b32 s, {word}, 0x7f807f80;")
    lines.append("mov.b32 {g, h}, s; mov.b32 lo, {g, g}; mov.b32 hi, {h, h};")
    lines.append(f"mov.b32 nz, {_NEGATIVE_ZERO};")
    return lines


@triton.constexpr_function
def code_lines(bits, code, i, a):
    """PTX: the eight codes of word i in the registers a."""
    word, neighbour = code[i], code[i ^ 1]
    if bits == "float16 cvt":
        return [f"mov.b32 {{q0, q1, q2, q3}}, {word};"] + [
            f"cvt.rn.f16x2.e2m1x2 {a[j]}, q{j};" for j in range(4)
        ]
    if bits == "float16":
        return [
            f"and.b32 {a[0]}, {word}, 0x8e008e00;",
            f"shl.b32 t, {word}, 8; and.b32 {a[1]}, t, 0x8e008e00;",
            f"shr.u32 t, {word}, 3; and.b32 m, t, 0x0e0e0e0e;",
            f"shl.b32 t, {word}, 7; lop3.b32 m, t, 0x80808080, m, 0xea;",
            f"and.b32 {a[2]}, m, 0xff00ff00; prmt.b32 {a[3]}, m, 0, 0x2404;",
        ]
    lines = [
        f"and.b32 {a[0]}, {word}, 0x81c081c0;",
        f"shl.b32 t, {word}, 4; and.b32 {a[1]}, t, 0x81c081c0;",
        f"shf.l.wrap.b32 t, {word}, {word}, 10; and.b32 {a[2]}, t, 0x81c081c0;",
    ]
    if i % 2 == 0:  # m holds register 3 of this word and of the next
        lines.append(f"shl.b32 t, {neighbour}, 2; lop3.b32 m, {word}, t, 0x06030603, 0xe4;")
        lines.append(f"shl.b32 t, m, 6; and.b32 {a[3]}, t, 0x81c081c0;")
    else:
        lines.append(f"shf.l.wrap.b32 t, m, m, 12; and.b32 {a[3]}, t, 0x81c081c0;")
    return lines


@triton.constexpr_function
def tile_constraints(tokens, words):
    """Return the constraints of `tile_asm`'s operands."""
    sums = 4 * tokens
    return ",".join(["=f"] * sums + ["f"] * sums + ["r"] * (4 + words + 8 * tokens))
