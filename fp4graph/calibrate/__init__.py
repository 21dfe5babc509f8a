"""Better codes in the same formats than rounding to nearest with absmax scales gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.calibrate.calibration import Calibration
from fp4graph.calibrate.four_over_six import four_over_six
from fp4graph.calibrate.gptq import DAMPING, gptq
from fp4graph.calibrate.hessian import Hessian, output_error
from fp4graph.calibrate.scale_search import scale_search
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

DATA_FREE: dict[str, Callable[[Tensor, BlockFormat], PackedWeight]] = {
    "four-over-six": four_over_six,
    "scale-search": scale_search,
}
"""Quantisers that need a weight and a format alone, by name."""

CALIBRATED = ("gptq", *(f"gptq:{name}" for name in DATA_FREE))
"""Quantisers that need data, by name; after the colon stands what chooses the scales."""


def grid_of(quantizer: str, format: BlockFormat) -> Callable[[Tensor, BlockFormat], PackedWeight]:
    """Return what chooses the scales for a quantiser that needs data.

    Raises:
        OptionError: the format has no use for it.
    """
    name = quantizer.partition(":")[2] or "rtn"
    check_format(name, format)
    return DATA_FREE.get(name, lambda weight, format: format.quantize(weight))


def check_format(quantizer: str, format: BlockFormat) -> None:
    """Check that a format has a use for a quantiser.

    Raises:
        OptionError: it has none.
    """
    if quantizer.rpartition(":")[2] == "four-over-six" and not format.has_per_tensor_scale:
        raise OptionError(f"quantizer {quantizer!r} is for nvfp4: {format} has powers of two alone")


__all__ = [
    "CALIBRATED",
    "DAMPING",
    "DATA_FREE",
    "Calibration",
    "Hessian",
    "check_format",
    "four_over_six",
    "gptq",
    "grid_of",
    "output_error",
    "scale_search",
]
