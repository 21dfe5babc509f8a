"""Better codes in the same formats than rounding to nearest with absmax scales gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.calibrate.four_over_six import four_over_six
from fp4graph.calibrate.scale_search import scale_search

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from fp4graph.formats import BlockFormat, PackedWeight

DATA_FREE: dict[str, Callable[[Tensor, BlockFormat], PackedWeight]] = {
    "four-over-six": four_over_six,
    "scale-search": scale_search,
}
"""Quantisers that need a weight and a format alone, by name."""

__all__ = ["DATA_FREE", "four_over_six", "scale_search"]
