"""Which kernel and tile for which problem: arithmetic on sizes alone; not tuned yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp4graph.kernels.target import Target

MOST_ROWS = 128  # of x that it pays to decode the weight for, a tile of rows at a time
_GEMV_ROWS = 2


@dataclass(frozen=True)
class Tile:
    """How a linear is cut into programs.

    Attributes:
        rows: of x in a program; 0 for the GEMV, which takes one.
        columns: rows of the weight, columns of y, in a program.
        depth: columns of K that a step takes.
        split: programs that share a sum, added up afterwards in order.
        warps: warps in a program.
        stages: steps whose loads are in flight.
    """

    rows: int
    columns: int
    depth: int
    split: int
    warps: int = 4
    stages: int = 3

    def __str__(self) -> str:
        kind = (
            f"{self.rows}x{self.columns}x{self.depth}"
            if self.rows
            else "gemv " + (f"{self.columns}x{self.depth}")
        )
        return f"{kind}, {self.warps} warps" + (f", split {self.split}" if self.split > 1 else "")


def programs(target: Target) -> int:
    """Return how many programs fill a device: two a multiprocessor."""
    return 2 * target.multiprocessors


def choose(M: int, N: int, K: int, programs: int) -> Tile:
    """Choose a tile.

    Args:
        M: rows of x.
        N: rows of the weight.
        K: columns of both.
        programs: how many fill the device.
    """
    if M <= _GEMV_ROWS:
        columns, depth = 16, 512
        return Tile(0, columns, depth, _split(M * _up(N, columns), K, depth, programs))
    rows = 16 if M <= 16 else 32 if M <= 32 else 64
    columns, depth = 128 if N >= 128 else 64, 64  # deeper ones spill registers on some targets
    blocks = _up(M, rows) * _up(N, columns)
    return Tile(rows, columns, depth, _split(blocks, K, depth, programs))


def _up(n: int, to: int) -> int:
    return -(-n // to)


def _split(blocks: int, K: int, depth: int, programs: int) -> int:
    """Split sums while programs are few and each part keeps four steps at least."""
    split = 1
    while blocks * split * 2 <= programs and depth * split * 8 <= K:
        split *= 2
    return split
