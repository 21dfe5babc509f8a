"""From how many rows on activations of 8 bits are worth it: measured on this machine, and kept.

Protocol: both ways alternate, on weights that are cold where few rows are, for two shapes of a
small model. Rounding must gain a tenth, for it is an approximation. Times of a busy machine are
used, with a warning, and not kept.
"""

from __future__ import annotations

import ctypes
import logging
import math
import statistics
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch

from fp4graph.kernels.cpu.library import FORMAT_CODES, native
from fp4graph.machine import processor
from fp4graph.timing import alternated, is_quiet, keep, kept, kept_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

    Op = Callable[..., Tensor]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WORTH = 1.1
_SHAPES = ((4864, 896), (896, 4864))
_ROUNDS = 7
_COLD_BYTES = 64e6
_COLD_ROWS = 16  # up to which weights come from memory
ROUNDED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes of which activations are ever rounded, and their numbers there."""
_LOG = logging.getLogger("fp4graph.kernels")


def settle(format: BlockFormat, dtype: torch.dtype, rows: Sequence[int]) -> None:
    """Let the library's `auto` ops change at these numbers of rows; see `fp4_cross` in fp4.h."""
    library = native()
    assert library is not None
    array = (ctypes.c_int64 * len(rows))(*rows)
    failed = library.lib.fp4_cross(FORMAT_CODES[format.base], ROUNDED[dtype], array, len(rows))
    assert not failed


def describe(rows: Sequence[int]) -> str:
    """Say what is done from how many rows on.

    >>> describe(()), describe((2,))
    ('exact at any number of rows', 'exact, 8 bits from 2 rows on')
    """
    if not rows:
        return "exact at any number of rows"
    turns = ("8 bits" if number % 2 == 0 else "exact" for number in range(len(rows)))
    return "exact, " + ", ".join(
        f"{how} from {count} rows on" for how, count in zip(turns, rows, strict=True)
    )


@lru_cache
def crossings(
    format: BlockFormat,
    dtype: torch.dtype,
    exact: Op,
    int8: Op,
    pack: Callable[[PackedWeight], tuple[Tensor, Tensor]],
) -> tuple[int, ...]:
    """Return the numbers of rows at which the faster way changes; below the first it is `exact`.

    Args:
        format: of the weight.
        dtype: of activations; float64, which is never rounded, crosses nowhere.
        exact: the op `(x, *packed, bias)`.
        int8: the one that rounds.
        pack: lays a weight out for both.
    """
    if dtype not in ROUNDED:
        return ()
    library = native()
    assert library is not None
    file = kept_file("crossings", processor(), library.isa, torch.get_num_threads())
    key = f"{format.base} {dtype}"
    known = kept(file)
    if key in known:
        return tuple(known[key])
    gains, quiet = _measured(format, dtype, exact, int8, pack)
    found = changes(gains)
    if quiet:
        with suppress(OSError):  # it is measured again
            keep(file, {key: found})
    else:
        _LOG.warning("the machine was busy while activations=auto was timed: not kept")
    return tuple(found)


def changes(gains: Sequence[float]) -> list[int]:
    """Return the rows at which one turns to the other, by how much rounding gains at `ROWS`.

    One number of rows that differs from both its neighbours is taken for noise.
    """
    worth = [gain >= WORTH for gain in gains]
    for place in range(1, len(worth) - 1):
        if worth[place - 1] == worth[place + 1]:
            worth[place] = worth[place - 1]
    before = [False, *worth[:-1]]
    return [rows for rows, now, was in zip(ROWS, worth, before, strict=True) if now != was]


@torch.no_grad()
def _measured(
    format: BlockFormat,
    dtype: torch.dtype,
    exact: Op,
    int8: Op,
    pack: Callable[[PackedWeight], tuple[Tensor, Tensor]],
) -> tuple[list[float], bool]:
    """Return how many times faster rounding is at `ROWS`, and whether the machine was quiet."""
    logs = [0.0] * len(ROWS)
    quiet = True
    for n, k in _SHAPES:
        generator = torch.Generator().manual_seed(0)
        first = pack(format.quantize(torch.randn(n, k, generator=generator, device="cpu")))
        copies = max(2, round(_COLD_BYTES / first[0].nbytes))
        pool = [first, *(tuple(each.clone() for each in first) for _ in range(copies - 1))]
        for place, rows in enumerate(ROWS):
            x = torch.randn(rows, k, generator=generator, device="cpu").to(dtype)
            some = pool if rows <= _COLD_ROWS else pool[:1]
            times = alternated([partial(_run, op, x, some) for op in (exact, int8)], _ROUNDS)
            ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
            logs[place] += math.log(ratio) / len(_SHAPES)
            quiet &= is_quiet(times)
    return [math.exp(each) for each in logs], quiet


def _run(op: Op, x: Tensor, pool: Sequence[tuple[Tensor, ...]]) -> None:
    for packed in pool:
        op(x, *packed, None)
