"""Which way to multiply fragments is fastest on this device; what wins is kept."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fp4graph import quantize
from fp4graph.formats import FP4_FORMATS
from fp4graph.gpu_check.device import Call, paired
from fp4graph.gpu_check.exact import fused, of_bound, problem_of
from fp4graph.kernels.triton.mma import FRAGMENTS
from fp4graph.kernels.triton.mma.cut import Cut, choose
from fp4graph.kernels.triton.mma.layout import COLUMNS
from fp4graph.kernels.triton.mma.ops import body
from fp4graph.kernels.triton.mma.wgmma.tile import Tile, tiles_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.gpu_check.device import Device
    from fp4graph.kernels.triton.mma.cut import Unpack

    Way = Cut | Tile | Unpack

FORMAT = "nvfp4"
ROWS = (1, 128, 64, 256, 16, 512, 32)  # first what there is most to win for
_WARPS = ((1, 2), (2, 1), (1, 4), (2, 2), (4, 1))  # wn, wk
_RING = 4
_REGISTERS = 96  # with a ring, for each eight rows of x
_GAIN = 1.02  # what a change must bring, or it is noise
_ROUNDS = 7
_LAST_ROUNDS = 21


@dataclass(frozen=True)
class Tuned:
    """What came of one problem; the fields are the keys of the JSON file.

    Attributes:
        shape: of the weight, NxK.
        rows: of x.
        chosen: what arithmetic takes.
        best: the fastest; `chosen` where nothing is faster.
        us: microseconds of the best, the median.
        gain: times that it is faster than `chosen`, measured anew in pairs.
        tried: how many ways were timed.
        failed: errors of those that could not run, or were wrong.
    """

    shape: str
    rows: int
    chosen: str
    best: str
    us: float
    gain: float
    tried: int
    failed: tuple[str, ...]
    cut: Cut | Tile | None = None
    """To keep; None where `chosen` stays."""


def is_tuned(device: Device, n: int, k: int, rows: int) -> bool:
    """Whether a device has more than one way to multiply so many rows."""
    has_kernel = FRAGMENTS in fused(device, n, k, FORMAT, torch.bfloat16)
    return has_kernel and len(_first(device, n, k, rows)) > 1


def _first(device: Device, n: int, k: int, rows: int) -> list[Way]:
    """Return what arithmetic takes, and after it where a search goes first."""
    chosen = choose(rows, n, k, device.target)
    near = neighbours(chosen, k) if isinstance(chosen, Cut) else []
    return [chosen, *near, *tiles_for(rows, n, k, device.target)]


def neighbours(cut: Cut, k: int) -> list[Cut]:
    """Return the cuts that differ from one in one respect, for K columns."""
    records = -(-k // COLUMNS)
    found = [replace(cut, split=each) for each in (cut.split // 2, cut.split * 2)]
    found += [replace(cut, wn=wn, wk=wk) for wn, wk in _WARPS]
    if cut.ring:
        found.append(replace(cut, ring=0, most_registers=None))
    else:
        found.append(replace(cut, tiles=6 - cut.tiles))  # 2 or 4
        if cut.tokens <= 2:
            registers = _REGISTERS * cut.tokens
            found.append(replace(cut, tiles=4, ring=_RING, most_registers=registers))
    return [
        each
        for each in found
        if each != cut
        and 1 <= each.split <= 16
        and records % each.wk == 0
        and records >= each.wk * each.split
    ]


def tune(device: Device, n: int, k: int, rows: int) -> Tuned:
    """Go from the chosen cut to its fastest neighbour until none is faster.

    On Hopper all tiles of wgmma are among the first neighbours. What is tried must run, be exact
    and give the same bits again.
    """
    generator = torch.Generator().manual_seed(n + k)
    w_NK = torch.randn(n, k, generator=generator).to(device.where) / k**0.5
    x_MK = torch.randn(rows, k, generator=generator).to(device.where, torch.bfloat16)
    packed = quantize(w_NK, FORMAT)
    tensors = FRAGMENTS.prepack(packed, problem_of(device, n, k, FORMAT, torch.bfloat16))

    def call(way: Way) -> Call:
        return Call(str(way), _multiply(device, x_MK, way), tensors)

    def error_of(way: Way) -> str:
        if error := call(way).fails():
            return error
        y_MN = call(way)()
        if (off := of_bound(y_MN, x_MK, packed, None)) > 1:
            return f"an error of {off:.3g} times its bound"
        return "" if torch.equal(y_MN, call(way)()) else "other bits at the second call"

    chosen, *more = _first(device, n, k, rows)
    best, tried = chosen, {chosen}
    failed: list[str] = []
    while more:
        tried.update(more)
        errors = {way: error_of(way) for way in more}
        failed += [f"{way}: {error}" for way, error in errors.items() if error]
        able = [way for way, error in errors.items() if not error]
        times = device.times([call(best), *map(call, able)], _ROUNDS)
        speeds = {way: paired(times[0], each) for way, each in zip(able, times[1:], strict=True)}
        fastest = max(speeds, key=speeds.__getitem__, default=best)
        if speeds.get(fastest, 1.0) < _GAIN:
            break
        best = fastest
        near = neighbours(best, k) if isinstance(best, Cut) else []
        more = [way for way in near if way not in tried]
    before, after = device.times([call(chosen), call(best)], _LAST_ROUNDS)
    gain = paired(before, after)
    if best == chosen or gain < _GAIN:  # the search had picked luck
        best, after, gain = chosen, before, 1.0
    return Tuned(
        f"{n}x{k}", rows, str(chosen), str(best), statistics.median(after) * 1e6, gain,
        len(tried), tuple(failed),
        best if isinstance(best, (Cut, Tile)) and best != chosen else None,
    )  # fmt: skip


def _multiply(device: Device, x_MK: Tensor, way: Way) -> Callable[..., Tensor]:
    run = body(FP4_FORMATS[FORMAT], device.target, cut=way)
    return lambda *tensors: run(x_MK, *tensors, None)
