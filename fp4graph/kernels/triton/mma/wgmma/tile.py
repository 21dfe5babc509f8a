"""How the wgmma kernel cuts a product into programs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.kernels.triton.mma.layout import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp4graph.kernels.target import Target

MOST_ROWS = 512  # of x; for more the weight is unpacked at each call
_LEAST_ROWS = 17  # fewer are bound by reading the weight, as `mma.sync` does it
_HOPPER = 90
_LEAST_RECORDS = 4  # that a program takes, or its start and end outweigh them
_STAGES = {(32, 1): 6, (64, 1): 4, (64, 2): 4, (128, 1): 4, (128, 2): 3}
_SPLITS = (1, 2, 4)


@dataclass(frozen=True)
class Tile:
    """The constants of a launch of `warpgroup_multiply`.

    Attributes:
        tokens: rows of x in a program.
        blocks: row blocks of 64 of the weight that a warpgroup has; a program has two warpgroups.
        split: programs that share rows and divide the columns.
    """

    tokens: int
    blocks: int
    split: int = 1

    @property
    def rows(self) -> int:
        """Rows of the weight in a program."""
        return 128 * self.blocks

    @property
    def stages(self) -> int:
        """Records in the ring: what 227 KB of shared memory hold.

        Raises:
            KeyError: there is no kernel of this size.
        """
        return _STAGES[self.tokens, self.blocks]

    @property
    def turns(self) -> bool:
        """Whether the kernel turns x itself; more rows leave it no registers for that."""
        return self.tokens <= 64

    @property
    def is_deep(self) -> bool:
        """Whether products run over the end of a record, for which the sums must leave room."""
        return self.tokens * self.blocks < 256

    def copies(self, N: int) -> bool:
        """Whether a result [M, N] of 16 bits can leave by copies, which want rows of 16 bytes."""
        return self.split == 1 and N % 8 == 0

    def __str__(self) -> str:
        split = f", split {self.split}" if self.split > 1 else ""
        return f"wgmma {self.rows}x{self.tokens}{split}"


def tiles_for(M: int, N: int, K: int, target: Target) -> Iterator[Tile]:
    """Yield what is worth timing for M rows of x and a weight [N, K]; nothing off Hopper."""
    if target.capability != _HOPPER or not _LEAST_ROWS <= M <= MOST_ROWS:
        return
    for (tokens, blocks), split in itertools.product(_STAGES, _SPLITS):
        tile = Tile(tokens, blocks, split)
        fills = tokens < 2 * M and (blocks == 1 or 64 * blocks < N)
        if fills and fits(tile, N, K):
            yield tile


def fits(tile: Tile, N: int, K: int) -> bool:
    """Say whether there is such a kernel, without spills, and each program has columns."""
    if (tile.tokens, tile.blocks) not in _STAGES:
        return False
    if tile.turns and tile.blocks == 2 and not tile.copies(N):
        return False  # the addresses of single stores would spill
    return 1 <= tile.split <= max(1, -(-K // COLUMNS) // _LEAST_RECORDS)
