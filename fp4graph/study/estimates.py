"""Estimates beside what was measured."""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

Key = TypeVar("Key", bound="Hashable")
_FEWEST = 5  # that have both


def to_scale(estimated: Mapping[Key, float], measured: Mapping[Key, float]) -> float | None:
    """Return what estimates are multiplied by to be on the scale of what was measured.

    It makes both sums equal over what has both; None where that are fewer than five.
    """
    both = [key for key in estimated if key in measured]
    told = fsum(estimated[key] for key in both)
    if len(both) < _FEWEST or not told:
        return None
    return fsum(measured[key] for key in both) / told
