"""Comparison against float64, the way low precision wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_l2(candidate: Tensor, reference: Tensor) -> float:
    """Return |candidate - reference| / |reference| in float64."""
    reference = reference.double()
    return float((candidate.double() - reference).norm() / reference.norm())


def assert_closer(candidate: Tensor, reference: Tensor, competitor: Tensor, slack: float) -> None:
    """Check that `candidate` is no further from `reference` than the ordinary `competitor` is."""
    ours, theirs = relative_l2(candidate, reference), relative_l2(competitor, reference)
    assert ours <= slack * theirs + 1e-12, f"{ours:.3g} against {theirs:.3g}"
