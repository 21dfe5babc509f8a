"""Which cut of the fragment kernel's work is fastest on this device; what wins is kept."""

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

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.gpu_check.device import Device

FORMAT = "nvfp4"
ROWS = (1, 16, 32, 64, 128)
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
        tried: how many cuts were timed.
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
    cut: Cut | None = None
    """To keep; None where `chosen` stays."""


def is_tuned(device: Device, n: int, k: int) -> bool:
    """Whether a device has the kernel that is cut."""
    return FRAGMENTS in fused(device, n, k, FORMAT, torch.bfloat16)


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

    Each cut that is tried must run and be exact.
    """
    generator = torch.Generator().manual_seed(n + k)
    w_NK = torch.randn(n, k, generator=generator).to(device.where) / k**0.5
    x_MK = torch.randn(rows, k, generator=generator).to(device.where, torch.bfloat16)
    packed = quantize(w_NK, FORMAT)
    tensors = FRAGMENTS.prepack(packed, problem_of(device, n, k, FORMAT, torch.bfloat16))

    def call(cut: Cut) -> Call:
        return Call(str(cut), _multiply(device, x_MK, cut), tensors)

    chosen = best = choose(rows, n, k, device.target)
    tried = {best}
    failed: list[str] = []
    while more := [cut for cut in neighbours(best, k) if cut not in tried]:
        tried.update(more)
        able = []
        for cut in more:
            error = call(cut).fails()
            if not error and (off := of_bound(call(cut)(), x_MK, packed, None)) > 1:
                error = f"an error of {off:.3g} times its bound"
            if error:
                failed.append(f"{cut}: {error}")
            else:
                able.append(cut)
        times = device.times([call(best), *map(call, able)], _ROUNDS)
        speeds = {cut: paired(times[0], each) for cut, each in zip(able, times[1:], strict=True)}
        fastest = max(speeds, key=speeds.__getitem__, default=best)
        if speeds.get(fastest, 1.0) < _GAIN:
            break
        best = fastest
    before, after = device.times([call(chosen), call(best)], _LAST_ROUNDS)
    gain = paired(before, after)
    if best == chosen or gain < _GAIN:  # the search had picked luck
        best, after, gain = chosen, before, 1.0
    return Tuned(
        f"{n}x{k}", rows, str(chosen), str(best), statistics.median(after) * 1e6, gain,
        len(tried), tuple(failed), best if best != chosen else None,
    )  # fmt: skip


def _multiply(device: Device, x_MK: Tensor, cut: Cut) -> Callable[..., Tensor]:
    run = body(FP4_FORMATS[FORMAT], device.target, cut=cut)
    return lambda *tensors: run(x_MK, *tensors, None)
