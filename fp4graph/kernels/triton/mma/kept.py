"""What was timed on this machine, by `fp4graph gpu-check`; it goes before arithmetic."""

from __future__ import annotations

import logging
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fp4graph import timing
from fp4graph.kernels.triton.mma.cut import MOST_ROWS, Cut, Unpack, choose, tokens_of
from fp4graph.kernels.triton.mma.layout import COLUMNS
from fp4graph.kernels.triton.mma.wgmma import tile as wgmma
from fp4graph.kernels.triton.mma.wgmma.tile import Tile

if TYPE_CHECKING:
    from pathlib import Path

    from fp4graph.kernels.target import Target

_LOG = logging.getLogger("fp4graph.kernels")


@lru_cache(maxsize=4096)  # a launch asks
def cut_for(M: int, N: int, K: int, target: Target) -> Cut | Tile | Unpack:
    """Return what was found best on this machine, or else what `choose` takes."""
    if M > wgmma.MOST_ROWS:
        return Unpack()
    file, key = _file(target), _key(M, N, K)
    values = timing.kept(file).get(key)
    if values is not None:
        cut = _fitting(values, M, N, K)
        if cut is not None:
            return cut
        _LOG.warning("%s: the cut for %s does not fit and does not count", file, key)
    return choose(M, N, K, target)


def keep(M: int, N: int, K: int, cut: Cut | Tile, target: Target) -> None:
    """Keep a cut or tile for a weight [N, K] and M rows of x, and all that fill as many.

    Raises:
        OSError: it cannot be written.
    """
    timing.keep(_file(target), {_key(M, N, K): asdict(cut)})
    cut_for.cache_clear()


def _file(target: Target) -> Path:
    return timing.kept_file("cuts", target.backend, target.arch, target.multiprocessors)


def _key(M: int, N: int, K: int) -> str:
    rows = 8 * tokens_of(M) if M <= MOST_ROWS else 256
    return f"{-(-M // rows) * rows} rows, {N}x{K}"


def _fitting(values: Any, M: int, N: int, K: int) -> Cut | Tile | None:
    """Return what was read; None for a cut that would leave out rows or columns."""
    try:
        if "blocks" in values:
            tile = Tile(**values)
            return tile if wgmma.fits(tile, N, K) else None
        cut = Cut(**values)
        fits = cut.tokens == tokens_of(M) and -(-K // COLUMNS) % cut.wk == 0
    except (TypeError, ZeroDivisionError):
        return None
    return cut if fits and M <= MOST_ROWS else None
