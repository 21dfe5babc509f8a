"""The stream of fragments on Hopper's `wgmma`, in Gluon: decoded weights are operand A.

y^T [64 rows of W, T rows of x] = W, in registers, times x^T, in shared memory. `wgmma.m64k16`'s A
is, warp by warp, `mma.sync.m16n8k16`'s: warp r of a warpgroup has row tile r of a record, and the
stream is that of `mma`, unchanged. A program has two warpgroups that decode and multiply and
others that fill a ring of STAGES records in shared memory. While one record's products run, the
next one's codes are decoded.

The pairs of x stand in the order in which a lane's scale group wants them (`mma.layout`): pair p of
quarter q of 64 columns (MXFP4: of 128) is slot pair 4p + q. Up to 64 rows a warpgroup reads x as
it lies and stores it turned; more were turned before the launch.
"""

# mypy: ignore-errors
# ruff: noqa: B007, RUF005, SIM108  (Gluon knows neither unpacking of tuples nor `_`)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fp4graph.kernels.triton.mma.wgmma.asm import (
    decode_asm,
    decode_constraints,
    move_constraints,
    moves,
)
from fp4graph.kernels.triton.mma.wgmma.turning import pairs_layout, store_turned


@gluon.jit
def operand(words, BITS: gl.constexpr, A: gl.constexpr):
    """Return four int32 [4, 128], word 4*lane + a of i is register a of MMA i, as A [64, 64]."""
    MOVES: gl.constexpr = moves()
    CONSTRAINTS: gl.constexpr = move_constraints()
    if BITS == "bfloat16":
        t = gl.inline_asm_elementwise(MOVES, CONSTRAINTS, words, dtype=(gl.bfloat16,) * 8,
                                      is_pure=True, pack=4)  # fmt: skip
    else:
        t = gl.inline_asm_elementwise(MOVES, CONSTRAINTS, words, dtype=(gl.float16,) * 8,
                                      is_pure=True, pack=4)  # fmt: skip
    even = gl.join(gl.join(t[0], t[1]), gl.join(t[2], t[3]))  # [4, 128, a/2, i%2]
    odd = gl.join(gl.join(t[4], t[5]), gl.join(t[6], t[7]))
    both = gl.join(even, odd).reshape([4, 8, 4, 2, 2, 2, 2, 2])  # r L/4 L%4 a%2 e a/2 i%2 i/2
    tile = both.permute([0, 3, 1, 7, 6, 5, 2, 4]).reshape([64, 64])
    return gl.convert_layout(tile, A, assert_trivial=True)


@gluon.jit
def decode(codes, scales, block, select, U: gl.constexpr, BITS: gl.constexpr, MX: gl.constexpr,
           L: gl.constexpr):  # fmt: skip
    """Return 64 columns, u = U, of a record as `operand` takes them."""
    code = codes.index(block).slice(4 * U, 4, dim=0).load(L)
    scale = gl.broadcast(scales.index(block).load(L), code)[0]
    ASM: gl.constexpr = decode_asm(BITS, MX, U)
    CONSTRAINTS: gl.constexpr = decode_constraints(MX)
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, (code, scale, select), dtype=(gl.int32,) * 4, is_pure=True,
        pack=4)  # fmt: skip


@gluon.jit
def selector(L: gl.constexpr):
    """Return what `prmt` takes of two words: the warp's, turned by 8 bits for its odd row tile."""
    r = gl.arange(0, 4, layout=gl.SliceLayout(1, L))[:, None]
    byte = gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :] % 4
    straight = gl.where(byte == 0, 0x10, 0x32)
    turned = gl.where(byte == 0, 0x03, 0x21)
    picked = gl.where(r % 2 == 0, straight, turned) + r // 2 * 0x44
    return gl.where(byte < 2, picked, 0).to(gl.int8)


@gluon.jit
def replaced(values, AT: gl.constexpr, COUNT: gl.constexpr, new):
    """Return a tuple with element AT exchanged."""
    out = ()
    for j in gl.static_range(COUNT):
        if j == AT:
            out = out + (new,)
        else:
            out = out + (values[j],)
    return out


@gluon.jit
def drained(sums, words, BLOCKS: gl.constexpr):
    """Wait for all products; return the sums."""
    done = warpgroup_mma_wait(0, deps=sums + words)
    out = ()
    for b in gl.static_range(BLOCKS):
        out = out + (done[b],)
    return out


@gluon.jit
def multiply_part(sums, a, before, select, ring, codes, scales, empty, slot, next, started,
                  WG: gl.constexpr, H: gl.constexpr, BLOCKS: gl.constexpr, BITS: gl.constexpr,
                  MX: gl.constexpr, A: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
                  DEEP: gl.constexpr):  # fmt: skip
    """Multiply part H, columns u = H / BLOCKS of row block H % BLOCKS; decode the part after it."""
    NEXT: gl.constexpr = (H + 1) % (2 * BLOCKS)
    x = ring.index(2 * slot + H // BLOCKS).permute((1, 0))
    new = warpgroup_mma(operand(a, BITS, A), x, sums[H % BLOCKS], is_async=True)
    if DEEP or H > 0:
        new = warpgroup_mma_wait(1, deps=(new,) + before)[0]  # `before` was its operand until now
        if DEEP and H == 0:
            freed = gl.where(slot == 0, STAGES - 1, slot - 1)
            mbarrier.arrive(empty.index(freed), pred=started)
    sums = replaced(sums, H % BLOCKS, BLOCKS, new)
    block = next * (2 * BLOCKS) + WG * BLOCKS + NEXT % BLOCKS
    return sums, decode(codes, scales, block, select, NEXT // BLOCKS, BITS, MX, L), a


@gluon.jit
def store_sums(sums, row_scale, bias, y, out, rb, M, N, C: gl.constexpr, TOKENS: gl.constexpr,
               HAS_BIAS: gl.constexpr, SPLIT: gl.constexpr, COPY_OUT: gl.constexpr):  # fmt: skip
    """Store [64, TOKENS] to y [M, N], or as raw sums to [SPLIT, M, N]."""
    row = rb * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, C))
    m0 = gl.program_id(1) * TOKENS
    if SPLIT == 1:
        sums = sums * gl.load(row_scale + row, mask=row < N, other=0.0)[:, None]
        if HAS_BIAS:
            sums += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)[:, None]
    if COPY_OUT:
        tma.store_wait(0)
        out.permute((1, 0)).store(sums.to(y.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(y, [m0, rb * 64], out)
    else:
        token = m0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, C))
        at = y + (gl.program_id(2) * M + token)[None, :] * N + row[:, None]
        gl.store(at, sums.to(y.dtype.element_ty),
                 mask=(token < M)[None, :] & (row < N)[:, None])  # fmt: skip


@gluon.jit
def consume(ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
            WG: gl.constexpr, BLOCKS: gl.constexpr, BITS: gl.constexpr, MX: gl.constexpr,
            HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
            DEEP: gl.constexpr, SPLIT: gl.constexpr, COPY_OUT: gl.constexpr):  # fmt: skip
    """Multiply BLOCKS row blocks, by the records from first to last, with TOKENS rows of x."""
    C: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, C, 2)
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    LAST: gl.constexpr = 2 * BLOCKS - 1
    select = selector(L)
    sums = ()
    for b in gl.static_range(BLOCKS):
        sums = sums + (gl.zeros([64, TOKENS], gl.float32, C),)
    mbarrier.wait(full.index(0), 0)
    a = decode(codes, scales, WG * BLOCKS, select, 0, BITS, MX, L)
    before = a
    slot = 0
    phase = 0
    for s in range(first, last):
        for h in gl.static_range(LAST):
            sums, a, before = multiply_part(
                sums, a, before, select, ring, codes, scales, empty, slot, slot, s > first,
                WG, h, BLOCKS, BITS, MX, A, L, STAGES, DEEP)  # fmt: skip
        more = s + 1 < last
        wraps = slot == STAGES - 1
        next = gl.where(more, gl.where(wraps, 0, slot + 1), slot)
        phase = gl.where(more, gl.where(wraps, phase ^ 1, phase), phase)
        mbarrier.wait(full.index(next), phase)
        sums, a, before = multiply_part(
            sums, a, before, select, ring, codes, scales, empty, slot, next, s > first,
            WG, LAST, BLOCKS, BITS, MX, A, L, STAGES, DEEP)  # fmt: skip
        if not DEEP:
            sums = drained(sums, before, BLOCKS)
            mbarrier.arrive(empty.index(slot))
        slot = next
    if DEEP:
        sums = drained(sums, before, BLOCKS)
    for b in gl.static_range(BLOCKS):
        rb = (gl.program_id(0) * 2 + WG) * BLOCKS + b
        store_sums(sums[b], row_scale, bias, y, out.index(WG), rb, M, N, C, TOKENS, HAS_BIAS, SPLIT,
                   COPY_OUT)  # fmt: skip
    if COPY_OUT:
        tma.store_wait(0)


@gluon.jit
def copy_record(code_desc, scale_desc, codes, scales, bar, slot, s, N, steps,
                ROW_BLOCKS: gl.constexpr):  # fmt: skip
    """Start the copies of a step's records; row blocks beyond the weight read its first."""
    for b in gl.static_range(ROW_BLOCKS):
        rb = gl.program_id(0) * ROW_BLOCKS + b
        record = gl.where(rb * 64 < N, rb, 0) * steps + s
        to = codes.index(slot * ROW_BLOCKS + b)._reinterpret(gl.int32, [1, 8, 128],
                                                             code_desc.layout)  # fmt: skip
        tma.async_copy_global_to_shared(code_desc, [record, 0, 0], bar, to)
        tma.async_copy_global_to_shared(
            scale_desc, [record, 0], bar, scales.index(slot * ROW_BLOCKS + b))  # fmt: skip


@gluon.jit
def produce(x, code_desc, scale_desc, ring, codes, scales, full, empty, first, last, N, steps,
            TOKENS: gl.constexpr, STAGES: gl.constexpr, ROW_BLOCKS: gl.constexpr,
            WITH_X: gl.constexpr):  # fmt: skip
    """Fill the ring with records, and with x if it was turned before."""
    WEIGHT: gl.constexpr = ROW_BLOCKS * (code_desc.nbytes_per_cta + scale_desc.nbytes_per_cta)
    m0 = gl.program_id(1) * TOKENS
    slot = 0
    phase = 1
    for s in range(first, last):
        mbarrier.wait(empty.index(slot), phase)
        bar = full.index(slot)
        if WITH_X:
            mbarrier.expect(bar, WEIGHT + 2 * x.nbytes_per_cta)
            tma.async_copy_global_to_shared(x, [m0, s * 128], bar, ring.index(2 * slot))
            tma.async_copy_global_to_shared(x, [m0, s * 128 + 64], bar, ring.index(2 * slot + 1))
        else:
            mbarrier.expect(bar, WEIGHT)
        copy_record(code_desc, scale_desc, codes, scales, bar, slot, s, N, steps, ROW_BLOCKS)
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def turn(x, ring, full, empty, M, stride, first, last, TOKENS: gl.constexpr, STAGES: gl.constexpr,
         GB: gl.constexpr):  # fmt: skip
    """Fill the ring with x as it lies, int32 [M, 64 * steps], two activations a word."""
    P: gl.constexpr = pairs_layout(TOKENS, GB)
    row = gl.program_id(1) * TOKENS + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, P))[:, None]
    column = gl.arange(0, 32 * GB, layout=gl.SliceLayout(0, P))[None, :]
    at = x + gl.where(row < M, row, 0) * stride + column + first * 64  # rows beyond M: never stored
    now = gl.load(at)
    slot = 0
    phase = 1
    for s in range(first, last):
        mbarrier.wait(empty.index(slot), phase)
        step = gl.where(s + 1 < last, 64, 0)
        if GB == 1:
            second = gl.load(at + 32)
            store_turned(ring, 2 * slot, now, TOKENS, GB)
            at += step
            now = gl.load(at)
            store_turned(ring, 2 * slot + 1, second, TOKENS, GB)
        else:
            at += step
            after = gl.load(at)
            store_turned(ring, 2 * slot, now, TOKENS, GB)
            now = after
        fence_async_shared()
        mbarrier.arrive(full.index(slot))
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def warpgroup_multiply(x, stride_xm, code_desc, scale_desc, row_scale, bias, y, M, N, steps,
                       BITS: gl.constexpr, G: gl.constexpr, HAS_BIAS: gl.constexpr,
                       TOKENS: gl.constexpr, BLOCKS: gl.constexpr, SPLIT: gl.constexpr,
                       STAGES: gl.constexpr, TURN: gl.constexpr, DEEP: gl.constexpr,
                       COPY_OUT: gl.constexpr):  # fmt: skip
    """Compute TOKENS rows of x W^T + bias, or with SPLIT > 1 a part of the raw sums, [SPLIT, M, N].

    x: with TURN int32 [M, 64 * steps], two activations a word, stride_xm in words; else a
    descriptor of turned x [M, 128 * steps]. y: a pointer, or with COPY_OUT a descriptor. A
    warpgroup has BLOCKS row blocks of 64. DEEP: products run over the end of a record.
    """
    DT: gl.constexpr = gl.bfloat16 if BITS == "bfloat16" else gl.float16
    MX: gl.constexpr = G == 32
    ROW_BLOCKS: gl.constexpr = 2 * BLOCKS
    FLAT: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    XS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    ring = gl.allocate_shared_memory(DT, [2 * STAGES, TOKENS, 64], XS)
    codes = gl.allocate_shared_memory(gl.int32, [ROW_BLOCKS * STAGES, 8, 128], FLAT)
    scales = gl.allocate_shared_memory(
        scale_desc.dtype, [ROW_BLOCKS * STAGES, 1, 128], scale_desc.layout)  # fmt: skip
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    if COPY_OUT:
        out = gl.allocate_shared_memory(y.dtype, [2, TOKENS, 64], y.layout)
    else:
        out = ring
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=2 if TURN else 1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    first = gl.program_id(2) * steps // SPLIT
    last = (gl.program_id(2) + 1) * steps // SPLIT
    if TURN:
        gl.warp_specialize([
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       0, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       1, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (turn, (x, ring, full, empty, M, stride_xm, first, last, TOKENS, STAGES, G // 16)),
            (produce, (x, code_desc, scale_desc, ring, codes, scales, full, empty, first, last, N,
                       steps, TOKENS, STAGES, ROW_BLOCKS, False)),
        ], [4, 4, 1])  # fmt: skip
    elif DEEP:
        gl.warp_specialize([
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       0, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       1, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (produce, (x, code_desc, scale_desc, ring, codes, scales, full, empty, first, last, N,
                       steps, TOKENS, STAGES, ROW_BLOCKS, True)),
        ], [4, 1])  # fmt: skip
    else:  # so many sums that the producer must give registers back
        gl.warp_specialize([
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       0, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (consume, (ring, codes, scales, full, empty, out, row_scale, bias, y, M, N, first, last,
                       1, BLOCKS, BITS, MX, HAS_BIAS, TOKENS, STAGES, DEEP, SPLIT, COPY_OUT)),
            (produce, (x, code_desc, scale_desc, ring, codes, scales, full, empty, first, last, N,
                       steps, TOKENS, STAGES, ROW_BLOCKS, True)),
        ], [4, 1], [240, 24])  # fmt: skip
