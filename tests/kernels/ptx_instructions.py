"""What each PTX instruction does to the registers of a program; see ptx.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from kernels.ptx_program import (
    E2M1,
    UNSIGNED,
    Instruction,
    Program,
    PtxError,
    bfloat16_bits,
    bfloat16_values,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]
Handler = Callable[[Program, Instruction], None]
_FLOATS = {16: np.float16, 32: np.float32}
_COMPARE = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip

HANDLERS: dict[str, Handler] = {}


def _handles(*names: str) -> Callable[[Any], Any]:
    def register(handler: Any) -> Any:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


@_handles("ld.param")
def _parameter(p: Program, i: Instruction) -> None:
    value = p.parameters[i.operands[1][1:-1].split("+")[0]] & ((1 << i.bits) - 1)
    p.write(i.operands[0], np.full(len(p.thread), value, UNSIGNED[i.bits]))


@_handles("ld.global", "ld.shared")
def _load(p: Program, i: Instruction) -> None:
    to, address = i.operands[:2]
    names = to if isinstance(to, list) else [to]
    size, at = i.bits // 8, p.address(address)
    p.check(i.name[1], at, size * len(names))
    for number, name in enumerate(names):
        where = np.where(p.active, at + number * size, 0)
        data = p.memory[i.name[1]][where[:, None] + np.arange(size)]
        p.write(name, np.ascontiguousarray(data).view(UNSIGNED[i.bits]).reshape(-1))


@_handles("st.global", "st.shared")
def _store(p: Program, i: Instruction) -> None:
    address, values = i.operands[:2]
    names = values if isinstance(values, list) else [values]
    size, at = i.bits // 8, p.address(address)
    p.check(i.name[1], at, size * len(names))
    for number, name in enumerate(names):
        data = np.ascontiguousarray(p.read(name, i.bits)).view(np.uint8).reshape(-1, size)
        where = (at + number * size)[p.active]
        p.memory[i.name[1]][where[:, None] + np.arange(size)] = data[p.active]


@_handles("cp.async")
def _copy(p: Program, i: Instruction) -> None:
    if i.name[2] in ("commit_group", "wait_group"):
        return
    to, source = p.address(i.operands[0]), p.address(i.operands[1])
    size = int(i.operands[2], 0)
    valid = p.read(i.operands[3]) if len(i.operands) > 3 else np.full(len(p.thread), size)
    p.check("shared", to, size)
    for byte in range(size):
        inside = p.active & (byte < valid)
        data = p.memory["global"][np.where(inside, source + byte, 0)]
        p.memory["shared"][to[p.active] + byte] = np.where(inside, data, 0)[p.active]


@_handles("mov")
def _move(p: Program, i: Instruction) -> None:
    to, source = i.operands
    if isinstance(to, list):
        width = 32 // len(to)
        word = p.read(source)
        for number, name in enumerate(to):
            part = word >> (number * width) & ((1 << width) - 1)
            p.write(name, part.astype(UNSIGNED[width]))
    elif isinstance(source, list):
        width = 32 // len(source)
        words = [p.read(each, width).astype(np.uint32) for each in source]
        parts = [word << n * width for n, word in enumerate(words)]
        p.write(to, np.bitwise_or.reduce(parts))
    elif i.name[-1] == "pred":
        p.write(to, p.predicate(source))
    else:
        p.write(to, p.read(source, i.bits))


@_handles("mul.rn.bf16x2", "mul.rn.f16x2", "fma.rn.bf16x2")
def _packed_product(p: Program, i: Instruction) -> None:
    bfloat16 = i.name[-1] == "bf16x2"
    if i.name[0] == "fma" and (p.read(i.operands[3]) != 0x80008000).any():
        raise PtxError("fma.rn.bf16x2 that adds more than -0")
    pairs = zip(*(p.halves(each, bfloat16=bfloat16) for each in i.operands[1:3]), strict=True)
    products = [a.astype(np.float64) * b.astype(np.float64) for a, b in pairs]
    _write_halves(p, i.operands[0], products, bfloat16=bfloat16)


@_handles("cvt.rn.f16x2.e2m1x2")
def _from_e2m1(p: Program, i: Instruction) -> None:
    byte = p.read(i.operands[1], 8)
    _write_halves(p, i.operands[0], [E2M1[byte & 15], E2M1[byte >> 4]], bfloat16=False)


def _write_halves(p: Program, to: str, values: Sequence[Array], *, bfloat16: bool) -> None:
    low, high = (
        bfloat16_bits(each.astype(np.float32))
        if bfloat16
        else each.astype(np.float16).view(np.uint16)
        for each in values
    )
    p.write(to, low.astype(np.uint32) | high.astype(np.uint32) << 16)


@_handles("cvt")
def _convert(p: Program, i: Instruction) -> None:
    after, before = i.name[-2:]
    if before == "f32" and after in ("bf16x2", "f16x2"):  # the first is the high half
        high, low = (p.float32(each) for each in i.operands[1:3])
        return _write_halves(p, i.operands[0], [low, high], bfloat16=after == "bf16x2")
    if before == "f32" and after == "bf16":
        return p.write(i.operands[0], bfloat16_bits(p.float32(i.operands[1])))
    if before == "f32" and after == "f16":
        return p.write(i.operands[0], p.float32(i.operands[1]).astype(np.float16))
    if after == "f32" and before in ("bf16", "f16"):
        half = p.read(i.operands[1], 16)
        value = bfloat16_values(half) if before == "bf16" else half.view(np.float16)
        return p.write(i.operands[0], value.astype(np.float32))
    if after[0] in "us" and before[0] in "us":
        read = p.signed if before[0] == "s" else p.read
        value = read(i.operands[1], int(before[1:]))
        return p.write(i.operands[0], value.astype(UNSIGNED[int(after[1:])]))
    raise PtxError(f"unknown conversion {'.'.join(i.name)}")


@_handles("lop3")
def _logic3(p: Program, i: Instruction) -> None:
    a, b, c = (p.read(each) for each in i.operands[1:4])
    table = int(i.operands[4], 0)
    out = np.zeros_like(a)
    for number in range(8):
        if table >> number & 1:
            picked = [x if number >> n & 1 else ~x for x, n in ((a, 2), (b, 1), (c, 0))]
            out |= picked[0] & picked[1] & picked[2]
    p.write(i.operands[0], out)


@_handles("prmt")
def _permute(p: Program, i: Instruction) -> None:
    low, high = (p.read(each).astype(np.uint64) for each in i.operands[1:3])
    both, selector = low | high << np.uint64(32), p.read(i.operands[3]).astype(np.uint64)
    out = np.zeros(len(p.thread), np.uint64)
    for byte in range(4):
        which = selector >> np.uint64(4 * byte) & np.uint64(15)
        if (which > 7)[p.active].any():
            raise PtxError("prmt that repeats signs")
        picked = both >> np.uint64(8) * (which & np.uint64(7)) & np.uint64(255)
        out |= picked << np.uint64(8 * byte)
    p.write(i.operands[0], out.astype(np.uint32))


@_handles("shf.l.wrap")
def _funnel(p: Program, i: Instruction) -> None:
    by = p.read(i.operands[3]).astype(np.uint64) & np.uint64(31)
    low, high = (p.read(each).astype(np.uint64) for each in i.operands[1:3])
    both = (high << np.uint64(32) | low) << by
    p.write(i.operands[0], (both >> np.uint64(32)).astype(np.uint32))


@_handles("bfe")
def _extract(p: Program, i: Instruction) -> None:
    start, count = (int(each, 0) for each in i.operands[2:4])
    p.write(i.operands[0], p.read(i.operands[1]) >> start & np.uint32((1 << count) - 1))


@_handles("shl")
def _shift_left(p: Program, i: Instruction) -> None:
    wide = p.read(i.operands[1], i.bits).astype(np.uint64)
    p.write(i.operands[0], (wide << p.read(i.operands[2])).astype(UNSIGNED[i.bits]))


@_handles("shr")
def _shift_right(p: Program, i: Instruction) -> None:
    read = p.signed if i.name[-1][0] == "s" else p.read
    value = read(i.operands[1], i.bits)
    p.write(i.operands[0], value >> p.read(i.operands[2]).astype(value.dtype))


def _bitwise(function: Callable[..., Array]) -> Handler:
    def handler(p: Program, i: Instruction) -> None:
        if i.name[-1] == "pred":
            values = [p.predicate(each) for each in i.operands[1:]]
        else:
            values = [p.read(each, i.bits) for each in i.operands[1:]]
        p.write(i.operands[0], function(*values))

    return handler


HANDLERS |= {
    "and": _bitwise(np.bitwise_and),
    "or": _bitwise(np.bitwise_or),
    "xor": _bitwise(np.bitwise_xor),
    "not": _bitwise(np.invert),
}


def _integers(p: Program, i: Instruction) -> list[Array]:
    """Return two operands, signed where the instruction's type is."""
    read = p.signed if i.name[-1][0] == "s" else p.read
    return [read(each, i.bits) for each in i.operands[1:3]]


@_handles("setp")
def _compare(p: Program, i: Instruction) -> None:
    a, b = _integers(p, i)
    if i.name[-1][0] == "f":
        a, b = a.view(_FLOATS[i.bits]), b.view(_FLOATS[i.bits])
    p.write(i.operands[0], _COMPARE[i.name[1]](a, b))


@_handles("selp")
def _select(p: Program, i: Instruction) -> None:
    a, b = (p.read(each, i.bits) for each in i.operands[1:3])
    p.write(i.operands[0], np.where(p.predicate(i.operands[3]), a, b))


def _arithmetic(function: Callable[..., Array]) -> Handler:
    def handler(p: Program, i: Instruction) -> None:
        values = [p.read(each, i.bits) for each in i.operands[1:3]]
        if i.name[-1] == "f32":
            values = [each.view(np.float32) for each in values]
        p.write(i.operands[0], function(*values))

    return handler


HANDLERS |= {
    "add": _arithmetic(np.add),
    "sub": _arithmetic(np.subtract),
    "mul.f32": _arithmetic(np.multiply),
}


@_handles("neg")
def _negate(p: Program, i: Instruction) -> None:
    p.write(i.operands[0], -p.signed(i.operands[1], i.bits))


@_handles("fma.rn.f32")
def _fused(p: Program, i: Instruction) -> None:
    a, b, c = (p.float32(each).astype(np.float64) for each in i.operands[1:4])
    p.write(i.operands[0], (a * b + c).astype(np.float32))


@_handles("mul.wide", "mad.wide")
def _wide_product(p: Program, i: Instruction) -> None:
    wide = np.int64 if i.name[-1][0] == "s" else np.uint64
    a, b = (each.astype(wide) for each in _integers(p, i))
    added = p.read(i.operands[3], 64) if i.name[0] == "mad" else np.uint64(0)
    p.write(i.operands[0], (a * b).view(np.uint64) + added)


@_handles("mul.lo", "mad.lo")
def _low_product(p: Program, i: Instruction) -> None:
    values = [p.read(each, i.bits) for each in i.operands[1:]]
    added = values[2] if i.name[0] == "mad" else 0
    p.write(i.operands[0], (values[0] * values[1] + added).astype(UNSIGNED[i.bits]))


@_handles("shfl")
def _shuffle(p: Program, i: Instruction) -> None:
    if i.name[2] not in ("bfly", "idx"):
        raise PtxError(f"unknown shuffle {'.'.join(i.name)}")
    lane = p.thread & 31
    other = lane ^ int(i.operands[2], 0) if i.name[2] == "bfly" else int(i.operands[2], 0)
    of_thread = (p.thread & ~31 | other) - p.thread[0]
    p.write(i.operands[0].split("|")[0], p.read(i.operands[1])[of_thread])


@_handles("elect")
def _elect(p: Program, i: Instruction) -> None:
    p.write(i.operands[0].split("|")[1], p.thread % 32 == 0)


@_handles("cvta")
def _to_global(p: Program, i: Instruction) -> None:
    p.write(i.operands[0], p.read(i.operands[1], 64))


@_handles("stmatrix")
def _store_matrices(p: Program, i: Instruction) -> None:
    """Four transposed 8 x 8 of 16 bits: lane 8j + r gives the address of row r of matrix j."""
    if "x4" not in i.name or "trans" not in i.name:
        raise PtxError(f"unknown store {'.'.join(i.name)}")
    lane, rows = p.thread & 31, p.address(i.operands[0])
    warp = (p.thread & ~31) - p.thread[0]
    for j, name in enumerate(i.operands[1]):
        word = p.read(name)
        for e, half in enumerate((word & 0xFFFF, word >> 16)):
            at = rows[warp + 8 * j + 2 * (lane & 3) + e] + 2 * (lane >> 2)
            p.memory["shared"].view(np.uint16)[at >> 1] = half.astype(np.uint16)


@_handles("mma")
def _matrix(p: Program, i: Instruction) -> None:
    """m16n8k16: A[g + 8(a%2), 2t + 8(a/2)], B[2t + 8b, g], C[g, 2t], g = lane/4 and t = lane%4."""
    if "m16n8k16" not in i.name:
        raise PtxError(f"unknown shape {'.'.join(i.name)}")
    bfloat16 = "bf16" in i.name
    lane = np.arange(32)
    g, t = lane >> 2, lane & 3
    warps = len(p.thread) // 32
    a, b, c = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8)), np.zeros((warps, 16, 8))
    to, a_names, b_names, c_names = i.operands
    for n, name in enumerate(a_names):
        for e, half in enumerate(p.halves(name, bfloat16=bfloat16)):
            a[:, g + 8 * (n & 1), 2 * t + e + 8 * (n >> 1)] = half.reshape(warps, 32)
    for n, name in enumerate(b_names):
        for e, half in enumerate(p.halves(name, bfloat16=bfloat16)):
            b[:, 2 * t + e + 8 * n, g] = half.reshape(warps, 32)
    for n, name in enumerate(c_names):
        c[:, g + 8 * (n >> 1), 2 * t + (n & 1)] = p.float32(name).reshape(warps, 32)
    d = (c + a @ b).astype(np.float32)
    for n, name in enumerate(to):
        p.write(name, np.ascontiguousarray(d[:, g + 8 * (n >> 1), 2 * t + (n & 1)]).reshape(-1))
