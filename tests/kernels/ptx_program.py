"""Registers and memory of one program of a PTX kernel; see ptx.py."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = np.ndarray[Any, Any]
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float16)
E2M1 = np.concatenate((_E2M1, -_E2M1))


class PtxError(Exception):
    """What a GPU would trap on, or this runner does not know."""


def bfloat16_bits(x: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def bfloat16_values(bits: Array) -> Array:
    """Return bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        guard: predicate and whether it is negated, or None.
        name: parts of its name, `("ld", "global", "b32")`.
        operands: text, or lists of texts for `{...}`.
    """

    guard: tuple[str, bool] | None
    name: tuple[str, ...]
    operands: tuple[Any, ...]

    @property
    def bits(self) -> int:
        """Width of the type that the name ends in; 32 where it names none."""
        found = re.fullmatch(r"(?:[busf]|bf)(\d+)(x2)?", self.name[-1])
        return int(found[1]) if found and not found[2] else 32


class Program:
    """One program: registers of all its threads, side by side."""

    def __init__(
        self, index: Sequence[int], threads: int, parameters: dict[str, int], memory: Array
    ) -> None:
        self.index, self.parameters = index, parameters
        self.thread = np.arange(threads)
        self.registers: dict[str, Array] = {}
        self.active = np.ones(threads, bool)
        self.memory = {"global": memory, "shared": np.full(1 << 17, 0xFF, np.uint8)}

    def read(self, operand: str, bits: int = 32) -> Array:
        """Return an operand as unsigned integers."""
        kind = UNSIGNED[bits]
        if operand in self.registers:
            return self.registers[operand].astype(kind, copy=False)
        if operand == "%tid.x":
            return self.thread.astype(kind)
        if operand.startswith("%ctaid"):
            return np.full(len(self.thread), self.index["xyz".index(operand[-1])], kind)
        if operand.startswith("global_smem"):
            return np.zeros(len(self.thread), kind)
        number = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(len(self.thread), number & ((1 << bits) - 1), kind)

    def signed(self, operand: str, bits: int) -> Array:
        return self.read(operand, bits).view(SIGNED[bits])

    def float32(self, operand: str) -> Array:
        return self.read(operand, 32).view(np.float32)

    def predicate(self, operand: str) -> Array:
        if operand in self.registers:
            return self.registers[operand]
        return np.full(len(self.thread), operand in ("-1", "1", "true"))

    def halves(self, operand: str, *, bfloat16: bool) -> list[Array]:
        word = self.read(operand)
        both = (word & 0xFFFF).astype(np.uint16), (word >> 16).astype(np.uint16)
        return [bfloat16_values(each) if bfloat16 else each.view(np.float16) for each in both]

    def write(self, name: str, value: Array) -> None:
        if value.dtype != bool:
            value = np.ascontiguousarray(value).view(UNSIGNED[8 * value.dtype.itemsize])
        if name in self.registers and not self.active.all():
            value = np.where(self.active, value, self.registers[name])
        self.registers[name] = value

    def address(self, operand: str) -> Array:
        found = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise PtxError(f"address {operand}")
        bits = 64 if found[1].startswith("%rd") else 32
        return self.read(found[1], bits).astype(np.int64) + int(found[2] or 0)

    def check(self, space: str, at: Array, size: int) -> None:
        inside = at[self.active]
        if (inside % size).any():
            raise PtxError(f"misaligned access of {size} bytes")
        if (inside < 0).any() or (inside + size > len(self.memory[space])).any():
            raise PtxError(f"access outside {space} memory")
