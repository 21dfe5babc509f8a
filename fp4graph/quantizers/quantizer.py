"""What a quantizer's name says: `scale-search`, `rtn@16`, `gptq:scale-search+smooth`, `mr-gptq`.

>>> from fp4graph.formats import MXFP4
>>> Quantizer.parse("gptq:scale-search@32", MXFP4)
Quantizer(solver='gptq', grid='scale-search', rotation=32, strength=0.0)
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp4graph.errors import OptionError
from fp4graph.formats import FP8, MXFP4_FITTED
from fp4graph.formats.rotation import ROTATIONS
from fp4graph.quantizers.alternating_search import alternating_search
from fp4graph.quantizers.four_over_six import four_over_six
from fp4graph.quantizers.grid_search import grid_search
from fp4graph.quantizers.scale_search import scale_search
from fp4graph.quantizers.smoothing import STRENGTH

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

    Grid = Callable[[Tensor, BlockFormat, Tensor | None], PackedWeight]

_WEIGHTED = "weighted-scale-search"
GRIDS: dict[str, Grid] = {
    "rtn": lambda weight, format, _: format.quantize(weight),
    "four-over-six": lambda weight, format, _: four_over_six(weight, format),
    "alternating-search": lambda weight, format, _: alternating_search(weight, format),
    "grid-search": lambda weight, format, _: grid_search(weight, format),
    "scale-search": lambda weight, format, _: scale_search(weight, format),
    _WEIGHTED: scale_search,
}
"""What chooses the scales for a weight and a format, and rounds to nearest under them.

The third argument is the mean square of each column's input; only the weighted search asks for it.
"""
DATA_FREE = tuple(grid for grid in GRIDS if grid != _WEIGHTED)
_FOR_NVFP4 = ("four-over-six", "alternating-search", "grid-search")
_SOLVERS = ("gptq", "learned", "distilled")
NEED_DATA = (
    _WEIGHTED,
    *(solver if grid == "rtn" else f"{solver}:{grid}" for solver in _SOLVERS for grid in GRIDS),
    "mr-gptq",
)
_SMOOTH = "+smooth"
_NAME = re.compile(
    r"(?P<base>[a-z:-]+)(@(?P<rotation>\d+)|(?P<smooth>\+smooth)(?P<strength>0?\.\d+|1)?)?"
)


@dataclass(frozen=True)
class Quantizer:
    """How the codes of a weight are found.

    Attributes:
        solver: `rtn`, `gptq`, or `learned` or `distilled`, which begin with what gptq gives.
        grid: what chooses the scales, one of `GRIDS`.
        rotation: block of the Hadamard rotation of weight and input; 0 for none.
        strength: SmoothQuant's alpha for inputs that come from a norm; 0 for none.
        name: what it was called: `mr-gptq` and `gptq@32` are equal for MXFP4.
    """

    solver: str
    grid: str
    rotation: int
    strength: float
    name: str = field(compare=False, repr=False)

    @classmethod
    def parse(cls, text: str | Quantizer, format: BlockFormat) -> Quantizer:
        """Read a name for a format, which may be another than that of a quantizer that is given.

        `mr-gptq` is what 2509.23202 prescribes: for NVFP4 the best scales under a rotation of 16,
        for MXFP4 its own scales under one of 32.

        Raises:
            OptionError: no such quantizer, or one that the format has no use for.
        """
        name = str(text)
        found = _NAME.fullmatch(name)
        base, rotation = (found["base"], int(found["rotation"] or 0)) if found else (name, 0)
        strength = float(found["strength"] or STRENGTH) if found and found["smooth"] else 0.0
        if base not in (*DATA_FREE, *NEED_DATA):
            known = ", ".join((*DATA_FREE, *NEED_DATA))
            raise OptionError(
                f"unknown quantizer {name!r}; quantizers are {known}, with "
                f"{', '.join(f'@{each}' for each in ROTATIONS)} for a rotation or {_SMOOTH} or "
                f"{_SMOOTH}0.5 for SmoothQuant behind it"
            )
        if rotation not in (0, *ROTATIONS):
            known = ", ".join(f"{base}@{each}" for each in ROTATIONS)
            raise OptionError(f"unknown quantizer {name!r}: rotations are {known}")
        if base == "mr-gptq":
            _check_use(name, base, "", format)
            if strength:
                raise OptionError(f"quantizer {name!r}: mr-gptq rotates, which {_SMOOTH} cannot")
            rotation = rotation or format.block_size
            grid = "scale-search" if format.base == "nvfp4" else "rtn"
            return cls("gptq", grid, rotation, 0.0, name)
        solver, _, grid = base.partition(":")
        if solver not in _SOLVERS:
            solver, grid = "rtn", base
        _check_use(name, solver, grid, format)
        if solver == "distilled" and not grid and format != MXFP4_FITTED:
            grid = _WEIGHTED
        return cls(solver, grid or "rtn", rotation, strength, name)

    def __str__(self) -> str:
        return self.name

    @property
    def trains(self) -> bool:
        """Whether it goes by what blocks give, beside what the dense ones give."""
        return self.solver in ("learned", "distilled")

    @property
    def needs_data(self) -> bool:
        """Whether its codes come from a calibration."""
        return self.solver in _SOLVERS or self.grid == _WEIGHTED or self.strength > 0


def _check_use(name: str, solver: str, grid: str, format: BlockFormat) -> None:
    searches = grid not in ("", "rtn")
    if searches and format == MXFP4_FITTED:
        raise OptionError(f"quantizer {name!r} searches scales, and {format} fits them")
    if format == FP8 and (searches or solver in ("learned", "distilled", "mr-gptq")):
        raise OptionError(f"quantizer {name!r} is for FP4: {format} has rtn and gptq")
    if grid in _FOR_NVFP4 and format.base != "nvfp4":
        problem = f"is for nvfp4: {format} has powers of two alone"
        raise OptionError(f"quantizer {name!r} {problem}")


RTN = Quantizer("rtn", "rtn", 0, 0.0, "rtn")
"""Round to nearest, which every format has."""
