"""From the stream back to a dense weight, in plain Triton: what many rows are multiplied with."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def rotate_left(word, BITS: tl.constexpr):
    """Rotate uint32 words."""
    return (word << BITS) | (word >> (32 - BITS))


@triton.jit
def half_values(half, SHIFT: tl.constexpr):
    """Sign in bit 15 and magnitude from bit SHIFT on, uint32 -> float32 value of the code."""
    bits = ((half >> SHIFT & 7) << 9) | (half & 0x8000)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def register_values(even, odd, A: tl.constexpr, BITS: tl.constexpr):
    """Register A of the words `even` and `odd`: values [P, 2 words, 2 halves]."""
    if BITS == "float16 cvt":
        a = (even >> 8 * A) & 0xFF
        b = (odd >> 8 * A) & 0xFF
        a = (a & 7) << 9 | (a & 8) << 12 | (a & 0x70) << 21 | (a & 0x80) << 24
        b = (b & 7) << 9 | (b & 8) << 12 | (b & 0x70) << 21 | (b & 0x80) << 24
        SHIFT: tl.constexpr = 9
    elif BITS == "float16":
        if A < 2:
            a = even << 8 * A
            b = odd << 8 * A
        else:
            a = ((even >> 3) & 0x0E0E0E0E | (even << 7) & 0x80808080) << 8 * (A - 2)
            b = ((odd >> 3) & 0x0E0E0E0E | (odd << 7) & 0x80808080) << 8 * (A - 2)
        SHIFT: tl.constexpr = 9
    else:
        if A == 3:
            both = even & 0x06030603 | rotate_left(odd, 2) & 0xF9FCF9FC
            a = rotate_left(both, 6)
            b = rotate_left(both, 12)
        elif A == 0:
            a = even
            b = odd
        else:
            a = rotate_left(even, 4 if A == 1 else 10)
            b = rotate_left(odd, 4 if A == 1 else 10)
        SHIFT: tl.constexpr = 6
    low = tl.join(half_values(a & 0xFFFF, SHIFT), half_values(b & 0xFFFF, SHIFT))
    high = tl.join(half_values(a >> 16, SHIFT), half_values(b >> 16, SHIFT))
    return tl.join(low, high)


@triton.jit
def scale_values(field, BITS: tl.constexpr, E4M3: tl.constexpr):
    """Scale bytes, int32 -> float32, as they multiply the values of codes and `row_scale`."""
    if E4M3:
        # `row_scale` has 2^7 of it, but where the hardware converts
        exponent = (field >> 3) + (127 - 15 if BITS == "float16 cvt" else 127 - 22 - 7)
        return (exponent << 23 | (field & 7) << 20).to(tl.float32, bitcast=True)
    if BITS == "bfloat16":
        exponent = field + (127 - 253)
    elif BITS == "float16":
        exponent = (field & 31) + (127 - 15 - 14)
    else:
        exponent = (field & 31) + (127 - 15)
    return (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def dequantize(stream, row_scale, w, N, K, steps, BITS: tl.constexpr, G: tl.constexpr,
               LARGEST: tl.constexpr):  # fmt: skip
    """Write one record, 64 rows by 128 columns, of w [N, K]."""
    GB: tl.constexpr = G // 16
    record = stream + (tl.program_id(0).to(tl.int64) * steps + tl.program_id(1)) * (
        1024 + 2048 // G)  # fmt: skip
    p = tl.arange(0, 512)  # pairs of words: u r lane i/2
    lane = p // 2 % 32
    r = p // 64 % 4
    u = p // 256
    even = tl.load(record + 2 * p).to(tl.uint32, bitcast=True)
    odd = tl.load(record + 2 * p + 1).to(tl.uint32, bitcast=True)
    word = tl.load(record + 1024 + lane * (4 // GB) + r // 2 * (2 // GB) + u // GB)
    pair = word.to(tl.uint32, bitcast=True)
    pair = tl.where(r % 2 == 1, rotate_left(pair, 8), pair)
    k = tl.program_id(1) * 128 + u // GB * 64 * GB + u % GB * 16 + lane % 4 * (16 * GB) + p % 2 * 8
    columns = k[:, None] + tl.arange(0, 8)[None, :]
    SHIFT: tl.constexpr = (4 if BITS == "bfloat16" else 7) if G == 16 else (
        7 if BITS == "bfloat16" else 10)  # fmt: skip
    for h in tl.static_range(2):
        row = tl.program_id(0) * 64 + r * 16 + lane // 4 + 8 * h
        # a/2 e from registers h and h + 2, within each of the two words
        first = register_values(even, odd, h, BITS)
        second = register_values(even, odd, h + 2, BITS)
        values = tl.join(first, second).permute(0, 1, 3, 2).reshape(512, 8)
        field = ((pair >> 16 * h + SHIFT) & 0xFF).to(tl.int32)
        scale = scale_values(field, BITS, G == 16)
        factor = scale * tl.load(row_scale + row, mask=row < N, other=0.0)
        dense = values * factor[:, None]
        dense = tl.clamp(dense, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        inside = (row < N)[:, None] & (columns < K)
        tl.store(w + row.to(tl.int64)[:, None] * K + columns, dense.to(w.dtype.element_ty),
                 mask=inside)  # fmt: skip
