"""The check of a device, step by step, in about ten minutes; what is found stays found."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.gpu_check import cuts, exact, faults, speed, whole
from fp4graph.gpu_check.device import reason_of
from fp4graph.gpu_check.found import STEPS, Found
from fp4graph.kernels.triton.mma.kept import keep
from fp4graph.study.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fp4graph.gpu_check.device import Device
    from fp4graph.study.latency import LatencyRow

    Sizes = tuple[int, int, int]

_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Work:
    """What is looked at: (N, K, rows) for weights [N, K].

    Attributes:
        exact: are the kernels right there, each in one of two dtypes in turn.
        faults: numbers of rows at which seeded faults must be found.
        cuts: is there a faster cut.
        times: how fast are they.
        model: times a whole model on the device.
    """

    exact: Sequence[Sizes] = exact.PROBLEMS
    faults: Sequence[int] = faults.ROWS
    cuts: Sequence[Sizes] = tuple((n, k, m) for m in cuts.ROWS for n, k in speed.SHAPES)
    times: Sequence[Sizes] = tuple((n, k, m) for n, k in speed.SHAPES for m in speed.ROWS)
    model: Callable[[Device], Iterable[LatencyRow]] = whole.generation


def check(
    device: Device,
    work: Work | None = None,
    *,
    save: Callable[[Found], None] = lambda found: None,
    progress: Progress = SILENT,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Check a device: is what kernels compute right there, are faults seen, how fast is it.

    What fails is noted, and the next begins. Cuts that were found faster are kept for all later
    runs on this machine (`kernels.triton.mma.kept`).

    Args:
        device: what to check.
        work: what to look at; None for what takes ten minutes.
        save: is called with what is found: at the beginning, after each step, at an interrupt.
        progress: is told how far it is.
        clock: seconds, from any point on.
    """
    work = work or Work()
    found = Found(device.facts())
    steps: dict[str, list[tuple[str, Callable[[], Iterable[Any]]]]] = {
        "exact": [
            (_named(*each), partial(exact.exactness, device, *each, dtype))
            for each, dtype in zip(work.exact, itertools.cycle(_DTYPES), strict=False)
        ],
        "faults": [(f"{rows} rows", partial(faults.faults, device, rows)) for rows in work.faults],
        "cuts": [
            (_named(*each), partial(_tuned, device, *each))
            for each in work.cuts
            if cuts.is_tuned(device, *each)
        ],
        "times": [(_named(*each), partial(speed.speeds, device, *each)) for each in work.times],
        "model": [("generation", partial(work.model, device))],
    }
    save(found)  # what cannot be written is said now
    try:
        for step, items in steps.items():
            _run(found, step, items, progress, clock)
            save(found)
    except KeyboardInterrupt:
        save(found)
        raise
    return found


def _run(
    found: Found,
    step: str,
    items: Sequence[tuple[str, Callable[[], Iterable[Any]]]],
    progress: Progress,
    clock: Callable[[], float],
) -> None:
    start = clock()
    counted, seconds = STEPS[step]
    progress.start(len(items), counted, budget=seconds)
    for name, do in items:
        if clock() - start > seconds:
            found.left_out.setdefault(step, []).append(name)
            continue
        try:
            found.rows[step].extend(do())
        except Exception as error:  # compilers, drivers and models raise anything
            found.errors.setdefault(step, []).append(f"{name}: {reason_of(error)}")
        progress.advance(name)
    found.seconds[step] = round(clock() - start, 1)


def _named(n: int, k: int, rows: int) -> str:
    return f"{n}x{k}, {rows} rows"


def _tuned(device: Device, n: int, k: int, rows: int) -> list[cuts.Tuned]:
    tuned = cuts.tune(device, n, k, rows)
    if tuned.cut is not None:
        keep(rows, n, k, tuned.cut, device.target)
    return [tuned]
