"""The portable kernels: plain Triton, any target, and the meaning of the faster ones to come.

Codes become float32 by way of float16: the three magnitude bits stand where float16's exponent
ends, so the number is 2^-14 of the value, exact down to the subnormal 0.5. No float8 casts: E4M3 is
read as the float16 of the same bits, one place lower, which is 2^-8 of it. G, the values that share
a scale, is 0 for FP8, whose scale is the row's.
"""

# Triton compiles these by their source, and takes no annotation but tl.constexpr.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def decode_codes(q):
    """Packed bytes [R, C] -> float32 [R, 2C], 2^-14 of the values, the even column first."""
    low = q.to(tl.uint16)
    high = low >> 4
    even = ((low & 7) << 9) | ((low & 8) << 12)
    odd = ((high & 7) << 9) | ((high & 8) << 12)
    both = tl.join(even, odd).reshape(q.shape[0], q.shape[1] * 2)
    return both.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def decode_scales(s, row_scale, E4M3: tl.constexpr):
    """Scale bytes [R, G] -> float32, 2^14 of them; E8M0 ones over the row's largest."""
    if E4M3:
        half = (s.to(tl.uint16) << 7).to(tl.float16, bitcast=True)
        return half.to(tl.float32) * (256.0 * 16384.0)
    top = (row_scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
    exponent = tl.maximum(s.to(tl.int32) - top[:, None] + (127 + 14), 0)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def decode_fp8(q):
    """Codes of FP8 -> float32, 2^-8 of the values."""
    wide = q.to(tl.uint16)
    half = ((wide & 127) << 7) | ((wide & 128) << 8)
    return half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_weights(qdata, scale, row_scale, rows, k0, N, Kp, E4M3: tl.constexpr, G: tl.constexpr,
                 BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Columns k0 to k0 + BK of BN rows, without the rows' own scale: float32 [BN, BK]."""
    inside = rows[:, None] < N
    if G == 0:
        column = k0 + tl.arange(0, BK)
        w = decode_fp8(tl.load(qdata + rows[:, None] * Kp + column[None, :],
                               mask=inside & (column[None, :] < Kp), other=0))  # fmt: skip
    else:
        byte = k0 // 2 + tl.arange(0, BK // 2)
        group = k0 // G + tl.arange(0, BK // G)
        q = tl.load(qdata + rows[:, None] * (Kp // 2) + byte[None, :],
                    mask=inside & (byte[None, :] < Kp // 2), other=0)  # fmt: skip
        s = tl.load(scale + rows[:, None] * (Kp // G) + group[None, :],
                    mask=inside & (group[None, :] < Kp // G), other=0)  # fmt: skip
        factor = decode_scales(s, row_scale, E4M3)
        w = (decode_codes(q).reshape(BN, BK // G, G) * factor[:, :, None]).reshape(BN, BK)
    return w


@triton.jit
def store_result(y, acc, row_scale, bias, at, inside, rows, N, HAS_BIAS: tl.constexpr):
    """Sums [BM, BN] times the rows' scale, plus bias, in the dtype of y."""
    acc = acc * row_scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gemm(x, qdata, scale, row_scale, bias, y, M, N, K, Kp, stride_xm,
         E4M3: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Compute x W^T + bias by tiles; with SPLIT > 1 a part of the raw sums, y [SPLIT, M, N]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    factor = tl.load(row_scale + n, mask=n < N, other=1.0)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(part * BK, Kp, SPLIT * BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + m[:, None] * stride_xm + k[None, :],
                    mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)  # fmt: skip
        w = load_weights(qdata, scale, factor, n, k0, N, Kp, E4M3, G, BN, BK)
        acc = tl.dot(a, w.to(a.dtype).T, acc)
    at = m[:, None] * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if SPLIT == 1:
        store_result(y, acc, factor, bias, at, inside, n, N, HAS_BIAS)
    else:
        tl.store(y + part * M * N + at, acc, mask=inside)


@triton.jit
def gemv(x, qdata, scale, row_scale, bias, y, M, N, K, Kp, stride_xm,
         E4M3: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
         BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """The same for one row of x a program, without matrix instructions."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    factor = tl.load(row_scale + n, mask=n < N, other=1.0)
    acc = tl.zeros((BN,), tl.float32)
    for k0 in range(part * BK, Kp, SPLIT * BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(x + m * stride_xm + k, mask=k < K, other=0.0).to(tl.float32)
        w = load_weights(qdata, scale, factor, n, k0, N, Kp, E4M3, G, BN, BK)
        acc += tl.sum(w * a[None, :], 1)
    at = m * N + n[None, :]
    if SPLIT == 1:
        store_result(y, acc[None, :], factor, bias, at, n[None, :] < N, n, N, HAS_BIAS)
    else:
        tl.store(y + part * M * N + at, acc[None, :], mask=n[None, :] < N)


@triton.jit
def dequantize(w, qdata, scale, row_scale, N, K, Kp, E4M3: tl.constexpr, G: tl.constexpr,
               LARGEST: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """Write a tile of the dense weight [N, K]."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    k = k0 + tl.arange(0, BK)
    factor = tl.load(row_scale + n, mask=n < N, other=1.0)
    dense = load_weights(qdata, scale, factor, n, k0, N, Kp, E4M3, G, BN, BK) * factor[:, None]
    dense = tl.clamp(dense, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(w + n.to(tl.int64)[:, None] * K + k[None, :], dense.to(w.dtype.element_ty),
             mask=(n[:, None] < N) & (k[None, :] < K))  # fmt: skip


@triton.jit
def reduce_parts(parts, row_scale, bias, y, M, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    """Add the parts of split sums up in order, so that the result is the same each time."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    at = m * N + n[None, :]
    inside = n[None, :] < N
    acc = tl.zeros((1, BN), tl.float32)
    for part in range(SPLIT):
        acc += tl.load(parts + part * M * N + at, mask=inside, other=0.0)
    factor = tl.load(row_scale + n, mask=n < N, other=1.0)
    store_result(y, acc, factor, bias, at, inside, n, N, HAS_BIAS)
