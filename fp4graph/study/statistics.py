"""Means over a text with the error that is theirs: windows are the independent units.

Tokens within a window are correlated, so the spread is taken between windows; one window has none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    Integers = np.ndarray[Any, np.dtype[np.int64]]
    Floats = np.ndarray[Any, np.dtype[np.float64]]

_RESAMPLES = 2000
_PERCENT = (2.5, 97.5)


def draws(count: int, resamples: int = _RESAMPLES) -> Integers:
    """Return which of `count` units each resample draws, with repeats: int64 [resamples, count]."""
    return np.random.default_rng(0).integers(0, count, (resamples, count))


def bootstrap(count: int, statistic: Callable[[Integers], Floats]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of a statistic.

    Args:
        count: how many independent units there are.
        statistic: from `draws` to a value for each of them.
    """
    low, high = np.percentile(statistic(draws(count)), _PERCENT)
    return float(low), float(high)


def mean_and_error(values_WT: Floats) -> tuple[float, float | None]:
    """Return the mean of values a token and its standard error, None with one window."""
    means_W = values_WT.mean(1)
    if len(means_W) < 2:
        return float(means_W.mean()), None
    return float(means_W.mean()), float(means_W.std(ddof=1) / math.sqrt(len(means_W)))


def interval(values_WT: Floats) -> tuple[float | None, float | None]:
    """Return the 95 % bootstrap interval of the mean: whole windows are drawn, with repeats."""
    means_W = values_WT.mean(1)
    if len(means_W) < 2:
        return None, None
    return bootstrap(len(means_W), lambda drawn_RW: means_W[drawn_RW].mean(1))


def halves(values_WT: Floats) -> tuple[float | None, float | None]:
    """Return how far the means of the two halves of a text are apart, and that difference's error.

    It is what the dense model alone differs by from one slice of text to another; None with fewer
    than four windows.
    """
    middle = len(values_WT) // 2
    if middle < 2:
        return None, None
    (first, error), (second, other) = map(mean_and_error, (values_WT[:middle], values_WT[middle:]))
    assert error is not None
    assert other is not None
    return abs(first - second), math.hypot(error, other)
