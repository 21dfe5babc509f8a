"""How a decode is cut into warps: arithmetic on sizes and on the target; not tuned on a GPU yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.kernels.triton.fragments.layout import COLUMNS, ROW_TILES

if TYPE_CHECKING:
    from fp4graph.kernels.target import Target

MOST_ROWS = 256  # of x that it pays to multiply with the stream itself
_MOST_TOKENS = 8
_WARPS_PER_MULTIPROCESSOR = 16  # to have enough loads in flight
_FAST_MEMORY = range(100, 110)  # B200 and B300, which plain loads do not keep busy
_LEAST_RECORDS = 2  # that a warp takes, or its start and end outweigh them


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


def choose(M: int, N: int, K: int, target: Target) -> Cut:
    """Choose a cut for M rows of x and a weight [N, K].

    Warps divide the columns inside a program before programs do, for sums over programs go through
    memory.
    """
    tokens = next((each for each in (1, 2, 4) if 8 * each >= M), _MOST_TOKENS)
    tiles = ROW_TILES if tokens <= 2 else 2
    beside = -(-N // (16 * tiles)) * -(-M // (8 * tokens))
    records = -(-K // COLUMNS)
    wanted = _WARPS_PER_MULTIPROCESSOR * target.multiprocessors
    wk = 1
    while wk < 4 and beside * wk < wanted and records % (2 * wk) == 0:
        wk *= 2
    split = 1
    while beside * wk * split < wanted and records >= 2 * split * wk * _LEAST_RECORDS:
        split *= 2
    ring = 4 if target.capability in _FAST_MEMORY and tokens <= 2 else 0
    registers = {1: 96, 2: 160}[tokens] if ring else None
    return Cut(tokens, tiles, 4 // wk, wk, split, ring, registers)
