"""Kernels that round activations into codes and scales; see `rounding`."""

# mypy: ignore-errors

import triton
import triton.language as tl

_SMALLEST = tl.constexpr(2.0**-110)  # that a float32 scale may be


@triton.jit
def encode(x, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, MOST: tl.constexpr):
    """Round float32 to nearest, ties to even codes, saturating: int32 codes; see `Minifloat`."""
    DROP: tl.constexpr = 23 - MANTISSA
    BIAS: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
    magnitude = tl.minimum(tl.abs(x), MOST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits + ((1 << (DROP - 1)) - 1) + ((bits >> DROP) & 1)) >> DROP
    normal -= (127 - BIAS) << MANTISSA
    # 2^23 leaves no room for a fraction
    whole = magnitude * (2.0 ** (BIAS - 1 + MANTISSA)) + 8388608.0
    subnormal = whole.to(tl.int32, bitcast=True) & 0xFF
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    return (sign << (EXPONENT + MANTISSA)) | code


@triton.jit
def largest_of_groups(x, largest, K, stride, BLOCK: tl.constexpr):
    """Raise float32 `largest`, as bits, to the largest magnitude of groups of 16 without NaN."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    value = tl.load(x + row * stride + column, mask=column < K, other=0.0).to(tl.float32)
    amax = _finite(tl.reshape(value, (BLOCK // 16, 16)), 0.0)
    tl.atomic_max(largest, tl.max(amax, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def _finite(x, otherwise):
    """The largest magnitude of each row, or something else where one is NaN or Inf."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, axis=1)  # NaN and Inf are above all others as integers
    return tl.where(amax < 0x7F800000, amax.to(tl.float32, bitcast=True), otherwise)


@triton.jit
def round_nvfp4(x, largest, qdata, scale, top, K, stride, steps, BLOCK: tl.constexpr):
    """Round one row's BLOCK columns: qdata [M, K/2], scale in tiles of 128 x 4, and their top."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    value = tl.load(x + row.to(tl.int64) * stride + column, mask=column < K, other=0.0)
    groups = tl.reshape(value.to(tl.float32), (BLOCK // 16, 16))
    above = tl.load(largest).to(tl.float32, bitcast=True)
    above = tl.maximum(tl.div_rn(above, 6.0 * 448.0), _SMALLEST)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.store(top, above)
    amax = _finite(groups, -1.0)
    wanted = tl.div_rn(tl.div_rn(tl.maximum(amax, 0.0), 6.0), above)
    codes = encode(tl.maximum(wanted, 0.001953125), 4, 3, 448.0)
    value_of = ((codes << 7).to(tl.int16).to(tl.float16, bitcast=True)).to(tl.float32) * 256.0
    factor = tl.div_rn(tl.div_rn(1.0, above), value_of)
    nibbles = tl.reshape(encode(groups * factor[:, None], 2, 1, 6.0), (BLOCK // 2, 2))
    low, high = tl.split(nibbles)
    at = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(qdata + row.to(tl.int64) * (K // 2) + at, (low | high << 4).to(tl.uint8), at < K // 2)
    group = tl.program_id(1) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    tile = (row // 128) * steps + group // 4
    to = scale + tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
    tl.store(to, tl.where(amax < 0, 0x7F, codes).to(tl.uint8), group < K // 16)


@triton.jit
def round_fp8(x, codes, scale, K, stride, BLOCK: tl.constexpr):
    """Round a row to E4M3 with one float32 scale."""
    row = tl.program_id(0).to(tl.int64)
    most = tl.zeros([1, BLOCK], tl.int32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + row * stride + column, mask=column < K, other=0.0).to(tl.float32)
        most = tl.maximum(most, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    amax = _finite(most.to(tl.float32, bitcast=True), -1.0)
    chosen = tl.maximum(tl.div_rn(tl.maximum(amax, 0.0), 448.0), _SMALLEST)
    tl.store(scale + row + tl.arange(0, 1), tl.where(amax < 0, float("nan"), chosen))
    factor = tl.div_rn(1.0, chosen)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(x + row * stride + column, mask=column < K, other=0.0).to(tl.float32)
        code = encode(value * factor[:, None], 4, 3, 448.0)
        tl.store(codes + row * K + column, code.to(tl.uint8), column < K)
