"""How `mma.sync`'s kernel is cut into warps: arithmetic on sizes and on the target.

Chosen by `bench/gpu_cuts.py` on an H100 and an H200 (docs/kernels.md); the ring, which B200 alone
gets, has not been on a GPU of its kind. What was timed on a machine goes before this: `kept`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.kernels.triton.mma.layout import COLUMNS

if TYPE_CHECKING:
    from fp4graph.kernels.target import Target

MOST_ROWS = 128  # of x that it pays to multiply with the stream itself
_FAST_MEMORY = range(100, 110)  # B200 and B300, which plain loads do not keep busy
_LEAST_RECORDS = 2  # that a warp takes, or its start and end outweigh them
_MOST_PARTS = 16  # of a sum, for they go through memory


@dataclass(frozen=True)
class Cut:
    """The constants of a launch of `multiply`.

    Attributes:
        tokens: eights of rows of x in a program.
        tiles: row tiles of 16 that a warp has.
        wn: warps of a program beside each other, on other rows of the weight.
        wk: warps of a program that share rows and divide the columns; divides the records of a row.
        split: programs that share rows and divide the columns.
        ring: stages of asynchronous copies; 0 for plain loads.
        most_registers: that a thread may use; None for what the compiler likes, which with a ring
            is too few.
    """

    tokens: int
    tiles: int
    wn: int
    wk: int
    split: int
    ring: int
    most_registers: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the weight in a program."""
        return 16 * self.tiles * self.wn

    def __str__(self) -> str:
        parts = [f"{self.rows}x{8 * self.tokens}", f"{self.wn}x{self.wk} warps"]
        if self.split > 1:
            parts.append(f"split {self.split}")
        if self.ring:
            parts.append(f"ring of {self.ring}")
        return ", ".join(parts)


@dataclass(frozen=True)
class _Warps:
    """What a program is made of, as in `Cut`, and how many warps a multiprocessor should get.

    The warps' registers bound the last: 32 rows of x leave room for 11.
    """

    tiles: int
    wn: int
    wk: int
    wanted: int


_BY_TOKENS = {1: _Warps(2, 1, 2, 32), 2: _Warps(2, 2, 1, 28), 4: _Warps(4, 2, 1, 8)}
_WITH_RING = {1: _Warps(4, 2, 2, 16), 2: _Warps(4, 4, 1, 16)}
_RING_REGISTERS = {1: 96, 2: 160}


@dataclass(frozen=True)
class Unpack:
    """No cut: the weight is unpacked at each call, and `F.linear` does the rest."""

    def __str__(self) -> str:
        return "unpacked at each call, then F.linear"


def tokens_of(M: int) -> int:
    """Return the eights of rows of x in a program; more than 32 rows are several programs."""
    return next((each for each in (1, 2) if 8 * each >= M), 4)


def choose(M: int, N: int, K: int, target: Target) -> Cut | Unpack:
    """Choose how to multiply M rows of x and a weight [N, K], as long as nothing was timed."""
    if M > MOST_ROWS:
        return Unpack()
    tokens = tokens_of(M)
    ring = 4 if target.capability in _FAST_MEMORY and tokens <= 2 else 0
    warps = _WITH_RING[tokens] if ring else _BY_TOKENS[tokens]
    records = -(-K // COLUMNS)
    wk = warps.wk if records % warps.wk == 0 else 1
    least = -(-N // (16 * warps.tiles)) * -(-M // (8 * tokens)) * wk
    split = 1
    while (
        split < _MOST_PARTS
        and 2 * split * least <= warps.wanted * target.multiprocessors
        and 2 * split * wk * _LEAST_RECORDS <= records
    ):
        split *= 2
    wn = warps.wn * warps.wk // wk
    registers = _RING_REGISTERS[tokens] if ring else None
    if tokens == 2 and target.capability < 90:
        registers = 88  # left to itself ptxas takes less, and spills
    return Cut(tokens, warps.tiles, wn, wk, split, ring, registers)
