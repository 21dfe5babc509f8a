"""Memory of a way to run a model, in a process of its own: nothing else is in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from fp4graph.apart import ApartError, call_apart
from fp4graph.memory import give_back_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4graph.models import LoadedModel


@dataclass(frozen=True)
class Footprint:
    """What a process took, bytes of resident memory.

    Attributes:
        resident: between two generations.
        peak: highest since the process began; loading and compiling are in it.
    """

    resident: int
    peak: int


def footprint(
    again: Callable[[], LoadedModel] | None, make: Callable[[LoadedModel], Callable[[], None]]
) -> Footprint | str:
    """Load a model and let it generate, in a new process.

    Args:
        again: loads it; None for one that cannot be loaded again.
        make: makes what generates, of the model.

    Returns:
        what was measured, or why nothing was.
    """
    if again is None:
        return "it was given as it is, and cannot be loaded again"
    try:
        found: Footprint = call_apart(_measure, again, make, torch.get_num_threads())
    except ApartError as error:
        return str(error)
    return found


def _measure(
    again: Callable[[], LoadedModel],
    make: Callable[[LoadedModel], Callable[[], None]],
    threads: int,
) -> Footprint:
    torch.set_num_threads(threads)
    generate = make(again())
    generate()
    give_back_memory()
    return Footprint(int(psutil.Process().memory_info().rss), _peak())


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # other systems than Linux
        import resource

        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "VmHWM" in line)
