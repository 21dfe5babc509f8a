"""What Hopper's TMA and wgmma do to memory and registers; see ptx_warps.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from kernels.ptx_program import Array, Instruction, Program, PtxError, bfloat16_values

if TYPE_CHECKING:
    from collections.abc import Callable

_SWIZZLE_128 = 1


@dataclass(frozen=True)
class Descriptor:
    """A tensor as TMA sees it; sizes with the outermost dimension first, strides in bytes."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int
    is_swizzled: bool


def move_box(
    shared: Array,
    memory: Array,
    tensor: Descriptor,
    start: list[int],
    place: int,
    *,
    is_store: bool,
) -> None:
    row_bytes = tensor.box[-1] * tensor.size
    for number, index in enumerate(np.ndindex(*tensor.box[:-1])):
        row = [first + step for first, step in zip(start, index, strict=False)]
        at = place + number * row_bytes + np.arange(row_bytes)
        if tensor.is_swizzled:
            assert row_bytes == 128
            at ^= (at >> 7 & 7) << 4
        inside = all(0 <= r < size for r, size in zip(row, tensor.shape, strict=False))
        columns = max(0, min(tensor.box[-1], tensor.shape[-1] - start[-1]))
        count = columns * tensor.size if inside else 0
        where = tensor.base + start[-1] * tensor.size
        where += sum(r * stride for r, stride in zip(row, tensor.strides, strict=False))
        if is_store:
            memory[where : where + count] = shared[at[:count]]
        else:
            shared[at] = 0
            shared[at[:count]] = memory[where : where + count]


def product_of(p: Program, shared: Array, i: Instruction) -> Callable[[], None]:
    """D += A B of a warp's 16 rows: A [16, 16] in registers, B [16, n] K-major in shared memory."""
    names, a_names = i.operands[:2]
    shape = re.search(r"m64n(\d+)k16", ".".join(i.name))
    if shape is None or not isinstance(a_names, list) or i.operands[4:7] != ("1", "1", "0"):
        raise PtxError(f"unknown product {'.'.join(i.name)}")
    if not p.predicate(i.operands[3]).all():
        raise PtxError("a product that does not add")
    descriptor = int(p.read(i.operands[2], 64)[0])
    bfloat16 = "bf16" in i.name

    def multiply() -> None:
        lane = p.thread & 31
        g, t = lane >> 2, lane & 3
        b = _shared_matrix(shared, descriptor, int(shape[1]), bfloat16=bfloat16)
        a, c = np.zeros((16, 16)), np.zeros((16, len(b)))
        for number, name in enumerate(a_names):
            for e, half in enumerate(p.halves(name, bfloat16=bfloat16)):
                a[g + 8 * (number & 1), 2 * t + e + 8 * (number >> 1)] = half
        place = [(g + 8 * (j % 4 // 2), 8 * (j // 4) + 2 * t + j % 2) for j in range(len(names))]
        for name, where in zip(names, place, strict=True):
            c[where] = p.float32(name)
        d = (c + a @ b.T).astype(np.float32)
        p.active = np.ones(32, bool)
        for name, where in zip(names, place, strict=True):
            p.write(name, np.ascontiguousarray(d[where]))

    return multiply


def _shared_matrix(shared: Array, descriptor: int, n: int, *, bfloat16: bool) -> Any:
    """Return [n, 16] float64 of what a matrix descriptor points at; swizzled by 128 bytes."""
    if descriptor >> 62 != _SWIZZLE_128:
        raise PtxError("a matrix that is not swizzled by 128 bytes")
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    row, k = np.meshgrid(np.arange(n), np.arange(16), indexing="ij")
    at = start + row // 8 * stride + row % 8 * 128 + 2 * k
    at ^= (at >> 7 & 7) << 4
    half = shared[: len(shared) & ~1].view(np.uint16)[at >> 1]
    return (bfloat16_values(half) if bfloat16 else half.view(np.float16)).astype(np.float64)
