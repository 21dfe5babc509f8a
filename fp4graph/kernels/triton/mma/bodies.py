"""The fragment kernel: decode on tensor cores straight from the stream, in Gluon, NVIDIA alone.

No shared memory but for a ring of loads and the sum over warps, no conversion of layouts, tokens
filled up to 8 and no further. See `layout` for what lies where.
"""

# mypy: ignore-errors
# ruff: noqa: RUF005  (Gluon knows no unpacking of tuples)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from fp4graph.kernels.triton.mma.asm import tile_asm, tile_constraints

_FENCE = gl.constexpr("bar.warp.sync 0xffffffff; " + "".join(
    f"mov.b32 ${i}, ${4 + i};" for i in range(4)))  # fmt: skip


@gluon.jit
def multiply_tile(sums, code, scale, x, BITS: gl.constexpr, MX: gl.constexpr, ARCH: gl.constexpr,
                  TOKENS: gl.constexpr, WORDS: gl.constexpr, PAIR: gl.constexpr):  # fmt: skip
    """Add one tile times TOKENS x 8 activations to the sums, a tuple of fragments."""
    ASM: gl.constexpr = tile_asm(BITS, MX, ARCH, TOKENS, WORDS, PAIR)
    CONSTRAINTS: gl.constexpr = tile_constraints(TOKENS, WORDS)
    return gl.inline_asm_elementwise(
        ASM, CONSTRAINTS, sums + (code, scale) + x, dtype=(gl.float32,) * TOKENS, is_pure=True,
        pack=4)  # fmt: skip


@gluon.jit
def multiply_record(sums, codes, scale, rows, k, BITS: gl.constexpr, GB: gl.constexpr,
                    ARCH: gl.constexpr, TOKENS: gl.constexpr, TILES: gl.constexpr,
                    WORDS: gl.constexpr):  # fmt: skip
    """Add a warp's tiles of one record, codes [2 * TILES], to the sums [TILES][TOKENS]."""
    for u in gl.static_range(2):
        here = k + (u // GB * 32 * GB + u % GB * 8)
        if GB == 2 and u == 1:
            # or these activations would be loaded with the last step's, and registers spill
            gl.inline_asm_elementwise(_FENCE, "=r,=r,=r,=r,r,r,r,r", (k,), dtype=gl.int32,
                                      is_pure=False, pack=4)  # fmt: skip
        x = ()
        for m in gl.static_range(TOKENS):
            x = x + (gl.load(rows[m] + here), gl.load(rows[m] + here + 4))
        new = ()
        for r in gl.static_range(TILES):
            new = new + (multiply_tile(
                sums[r], codes[u * TILES + r], scale, x, BITS, GB == 2, ARCH, TOKENS, WORDS,
                (r // 2 * (2 // GB) + u // GB) * 2 + r % 2),)  # fmt: skip
        sums = new
    return sums


@gluon.jit
def copy_record(code_slot, code_at, scale_slot, scale_at, inside):
    """Start the copies of a record to a slot of the ring; nothing is read unless `inside`."""
    all4 = gl.full(code_at.shape, 1, gl.int1, code_at.type.layout)
    all3 = gl.full(scale_at.shape, 1, gl.int1, scale_at.type.layout)
    # One copy of all codes and one of the scales: each more would cost a barrier.
    async_copy.async_copy_global_to_shared(
        code_slot, code_at, mask=all4 & inside, cache_modifier=".cg")  # fmt: skip
    async_copy.async_copy_global_to_shared(scale_slot, scale_at, mask=all3 & inside)
    async_copy.commit_group()


@gluon.jit
def store_sums(sums, row_scale, bias, y, M, N, part, HAS_BIAS: gl.constexpr, TOKENS: gl.constexpr,
               TILES: gl.constexpr, SPLIT: gl.constexpr, WN: gl.constexpr,
               L: gl.constexpr):  # fmt: skip
    """Add up the warps that share rows; store [M, N], or raw sums at [part, M, N]."""
    LS: gl.constexpr = gl.SliceLayout(1, L)
    n = gl.arange(0, WN, layout=gl.SliceLayout(1, LS))[:, None]
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, LS))[None, :]
    for r in gl.static_range(TILES):
        # registers 2 and 3 of a fragment are 8 rows further, odd ones a token further
        row = ((gl.program_id(0) * WN + n) * TILES + r) * 16 + c // 16 + c % 4 // 2 * 8
        factor = gl.load(row_scale + row, mask=row < N, other=0.0)
        for m in gl.static_range(TOKENS):
            token = (gl.program_id(2) * TOKENS + m) * 8 + c // 4 % 4 * 2 + c % 2
            value = gl.sum(sums[r][m], axis=1)
            if SPLIT == 1:
                value = value * factor
                if HAS_BIAS:
                    value += gl.load(bias + row, mask=row < N, other=0.0).to(gl.float32)
            gl.store(y + (part * M + token) * N + row, value.to(y.dtype.element_ty),
                     mask=(token < M) & (row < N))  # fmt: skip


@gluon.jit
def plain_loads(sums, code_at, scale_at, rows, k, first, last, BITS: gl.constexpr,
                GB: gl.constexpr, ARCH: gl.constexpr, TOKENS: gl.constexpr, TILES: gl.constexpr,
                WORDS: gl.constexpr, WK: gl.constexpr):  # fmt: skip
    """Add a warp's records, read straight into registers."""
    RECORD: gl.constexpr = 1024 + 128 // GB
    for _ in range(first, last):
        codes = ()
        for u in gl.static_range(2):
            for r in gl.static_range(TILES):
                codes = codes + (gl.load(code_at + (u * 4 + r) * 128, cache_modifier=".cg"),)
        scale = gl.load(scale_at, cache_modifier=".cg")
        code_at += RECORD * WK
        scale_at += RECORD * WK * 4 // WORDS
        sums = multiply_record(sums, codes, scale, rows, k, BITS, GB, ARCH, TOKENS, TILES, WORDS)
        k += 64 * WK
    return sums


@gluon.jit
def ring_of_copies(sums, stream, scale_at, rows, k, first, last, N, steps, BITS: gl.constexpr,
                   GB: gl.constexpr, ARCH: gl.constexpr, TOKENS: gl.constexpr,
                   WORDS: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr, RING: gl.constexpr,
                   L: gl.constexpr):  # fmt: skip
    """Add a warp's records, whole ones of 4 row tiles, read ahead through shared memory."""
    RECORD: gl.constexpr = 1024 + 128 // GB
    L4: gl.constexpr = gl.BlockedLayout([8, 1, 1, 4], [1, 1, 1, 32], [1, WN, WK, 1],
                                        [3, 2, 1, 0])  # fmt: skip
    FLAT4: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    FLAT3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    code_ring = gl.allocate_shared_memory(gl.int32, [RING, 8, WN, WK, 128], FLAT4)
    tile_ring = code_ring._reinterpret(gl.int32, [RING * 8, WN, WK, 128], FLAT3)
    scale_ring = gl.allocate_shared_memory(scale_at.dtype.element_ty, [RING, WN, WK, 128], FLAT3)
    q = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L4))))
    n = gl.arange(0, WN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L4))))
    s = gl.arange(0, WK, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L4))))
    c = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))
    block = gl.program_id(0) * WN + n[None, :][:, :, None][:, :, :, None]
    block = gl.where(block * 64 < N, block, 0).to(gl.int64) * steps
    record_at = (stream + (block + first * WK + s[None, :][:, None, :][:, :, :, None]) * RECORD
                 + q[:, None][:, :, None][:, :, :, None] * 128
                 + c[None, :][:, None, :][:, :, None, :])  # fmt: skip
    for p in gl.static_range(RING - 1):
        copy_record(code_ring.index(p), record_at, scale_ring.index(p), scale_at,
                    first + p < last)  # fmt: skip
        record_at += RECORD * WK
        scale_at += RECORD * WK * 4 // WORDS
    slot = 0
    for i in range(first, last):
        async_copy.wait_group(RING - 2)
        codes = ()
        for p in gl.static_range(8):
            codes = codes + (tile_ring.index(slot * 8 + p).load(L),)
        scale = scale_ring.index(slot).load(L)
        freed = gl.where(slot == 0, RING - 1, slot - 1)
        copy_record(code_ring.index(freed), record_at, scale_ring.index(freed), scale_at,
                    i + RING - 1 < last)  # fmt: skip
        record_at += RECORD * WK
        scale_at += RECORD * WK * 4 // WORDS
        slot = gl.where(slot == RING - 1, 0, slot + 1)
        sums = multiply_record(sums, codes, scale, rows, k, BITS, GB, ARCH, TOKENS, 4, WORDS)
        k += 64 * WK
    return sums


@gluon.jit
def multiply(x, stream, row_scale, bias, y, M, N, steps, stride_xm,
             BITS: gl.constexpr, G: gl.constexpr, ARCH: gl.constexpr, HAS_BIAS: gl.constexpr,
             TOKENS: gl.constexpr, TILES: gl.constexpr, WN: gl.constexpr, WK: gl.constexpr,
             SPLIT: gl.constexpr, RING: gl.constexpr):  # fmt: skip
    """Compute 8*TOKENS rows of x W^T + bias; with SPLIT > 1 a part of the raw sums, [SPLIT, M, N].

    x [M, 128*steps] is int32, two activations a word, stride_xm in words. WN x WK warps: a warp has
    TILES row tiles of 16 and every WK-th of its program's records; WK divides steps. RING: loads
    that are in flight through shared memory; 0 leaves them in registers.
    """
    # Tensors are [WN, WK, 128]: 4 neighbouring words a lane, one 16-byte load, which inline
    # assembly sees as 4 registers.
    L: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [WN, WK, 1], [2, 1, 0])
    GB: gl.constexpr = G // 16
    WORDS: gl.constexpr = TILES // 2 * (2 // GB)  # of scales that a lane uses, side by side
    SCALES: gl.constexpr = (gl.int8, gl.int16, gl.int32, gl.int32)[WORDS - 1]  # 4 of them a lane
    RECORD: gl.constexpr = 1024 + 2048 // G
    gl.static_assert(TILES == 4 or (TILES == 2 and RING == 0))
    wn = gl.arange(0, WN, layout=gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None][:, :, None]
    wk = gl.arange(0, WK, layout=gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :][:, :, None]
    col = gl.arange(0, 128, layout=gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, :][:, None, :]
    part = gl.program_id(1)
    first = part * (steps // WK) // SPLIT
    last = (part + 1) * (steps // WK) // SPLIT
    tile = (gl.program_id(0) * WN + wn) * TILES
    tile = gl.where(tile * 16 < N, tile, 0)  # warps beyond the weight read its start, store nothing
    at = ((tile // 4).to(gl.int64) * steps + first * WK + wk) * RECORD
    code_at = stream + at + tile % 4 * 128 + col
    scale_word = at + 1024 + col // 4 * (4 // GB) + tile % 4 // 2 * (2 // GB)
    scale_at = (stream + scale_word).to(gl.pointer_type(SCALES), bitcast=True) + col % 4
    rows = ()
    for m in gl.static_range(TOKENS):
        token = (gl.program_id(2) * TOKENS + m) * 8 + col // 16
        # tokens beyond M read row 0: their columns are never stored, so nothing needs a mask
        rows = rows + (x + gl.where(token < M, token, 0) * stride_xm + col % 4,)
    k = (first * WK + wk) * 64 + col // 4 % 4 * (8 * GB)
    zero = gl.zeros([WN, WK, 128], gl.float32, L)
    sums = ((zero,) * TOKENS,) * TILES
    if RING == 0:
        sums = plain_loads(sums, code_at, scale_at, rows, k, first, last, BITS, GB, ARCH, TOKENS,
                           TILES, WORDS, WK)  # fmt: skip
    else:
        sums = ring_of_copies(sums, stream, scale_at, rows, k, first, last, N, steps, BITS, GB,
                              ARCH, TOKENS, WORDS, WN, WK, RING, L)  # fmt: skip
    store_sums(sums, row_scale, bias, y, M, N, part, HAS_BIAS, TOKENS, TILES, SPLIT, WN, L)
