"""What a quantiser's name says: `scale-search`, `rtn@16`, `gptq:scale-search@32`, `mr-gptq`.

>>> from fp4graph.formats import MXFP4
>>> Quantizer.parse("gptq:scale-search@32", MXFP4)
Quantizer(solver='gptq', grid='scale-search', rotation=32)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fp4graph.calibrate.alternating_search import alternating_search
from fp4graph.calibrate.four_over_six import four_over_six
from fp4graph.calibrate.grid_search import grid_search
from fp4graph.calibrate.rotation import ROTATIONS
from fp4graph.calibrate.scale_search import scale_search
from fp4graph.errors import OptionError

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
_SOLVERS = ("gptq", "learned")
NEED_DATA = (
    _WEIGHTED,
    *(solver if grid == "rtn" else f"{solver}:{grid}" for solver in _SOLVERS for grid in GRIDS),
    "mr-gptq",
)
_NAME = re.compile(r"(?P<base>[a-z:-]+)(@(?P<rotation>\d+))?")


@dataclass(frozen=True)
class Quantizer:
    """How the codes of a weight are found.

    Attributes:
        solver: `rtn`, `gptq`, or `learned`, which begins with what gptq gives.
        grid: what chooses the scales, one of `GRIDS`.
        rotation: block of the Hadamard rotation of weight and input; 0 for none.
    """

    solver: str
    grid: str
    rotation: int

    @classmethod
    def parse(cls, name: str, format: BlockFormat) -> Quantizer:
        """Read a name.

        `mr-gptq` is what 2509.23202 prescribes: for NVFP4 the best scales under a rotation of 16,
        for MXFP4 its own scales under one of 32.

        Raises:
            OptionError: no such quantiser, or one that the format has no use for.
        """
        found = _NAME.fullmatch(name)
        base, rotation = (found["base"], int(found["rotation"] or 0)) if found else (name, 0)
        if base not in (*DATA_FREE, *NEED_DATA):
            known = ", ".join((*DATA_FREE, *NEED_DATA))
            raise OptionError(f"unknown quantizer {name!r}; quantizers are {known}")
        if rotation not in (0, *ROTATIONS):
            known = ", ".join(f"{base}@{each}" for each in ROTATIONS)
            raise OptionError(f"unknown quantizer {name!r}: rotations are {known}")
        if base == "mr-gptq":
            if rotation == 0:
                rotation = format.block_size
            return cls("gptq", "scale-search" if format.has_per_tensor_scale else "rtn", rotation)
        solver, _, grid = base.partition(":")
        if solver not in _SOLVERS:
            solver, grid = "rtn", base
        if grid in _FOR_NVFP4 and not format.has_per_tensor_scale:
            problem = f"is for nvfp4: {format} has powers of two alone"
            raise OptionError(f"quantizer {name!r} {problem}")
        return cls(solver, grid or "rtn", rotation)

    @property
    def needs_data(self) -> bool:
        """Whether its codes come from a calibration."""
        return self.solver in _SOLVERS or self.grid == _WEIGHTED
