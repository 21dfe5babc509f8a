"""Whether damages add up: sets against the sum of their linears, pairs against both alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING

from fp4graph.study.trial import set_of

if TYPE_CHECKING:
    from fp4graph.study.measured import Measured


@dataclass(frozen=True)
class _OfSetting:
    """What a row is of.

    Attributes:
        text: hash of the text that it was scored on.
        corpus: what the text is called.
        format: of the weights.
        activations: `none`, `same` or `int8`.
        quantizer: how the codes were found.
    """

    text: str
    corpus: str
    format: str
    activations: str
    quantizer: str


@dataclass(frozen=True)
class SetRow(_OfSetting):
    """A trial of several linears, each of which has a trial of its own.

    Attributes:
        name: its selector, with its direction.
        linears: how many.
        kl: measured, nats a token.
        kl_sum: the sum over its linears alone.
        dnll: measured.
        dnll_sum: the sum over its linears alone.
        dnll_se: standard error of `dnll`.
    """

    name: str
    linears: int
    kl: float
    kl_sum: float
    dnll: float
    dnll_sum: float
    dnll_se: float | None


@dataclass(frozen=True)
class PairRow(_OfSetting):
    """Two trials without a common linear, and a third of what both have in FP4.

    Attributes:
        first: selector of one, with its direction.
        second: of the other.
        kl: measured of both together, nats a token.
        kl_interaction: how far that is above the sum of both.
        dnll: measured of both together.
        dnll_interaction: how far that is above the sum.
    """

    first: str
    second: str
    kl: float
    kl_interaction: float
    dnll: float
    dnll_interaction: float


def sets(found: Measured) -> list[SetRow]:
    """Return the trials of several linears that can be compared with a sum, the largest first."""
    singles = found.singles
    rows = []
    for paths, row in found.trials.items():
        if len(paths) > 1 and all(path in singles for path in paths):
            parts = [singles[path] for path in paths]
            kl, dnll = fsum(part.kl for part in parts), fsum(part.dnll for part in parts)
            what = row.name or set_of(row), len(paths)
            row_of = SetRow(*_setting(found), *what, row.kl, kl, row.dnll, dnll, row.dnll_se)
            rows.append(row_of)
    return sorted(rows, key=lambda row: -row.linears)


def pairs(found: Measured) -> list[PairRow]:
    """Return all pairs of trials whose union is a trial too, the largest interaction first."""
    rows = []
    for (a, first), (b, second) in itertools.combinations(found.trials.items(), 2):
        both = found.trials.get(a | b) if a.isdisjoint(b) else None
        if both is not None:
            kl = both.kl - first.kl - second.kl
            dnll = both.dnll - first.dnll - second.dnll
            one, other = sorted((set_of(first), set_of(second)))
            rows.append(PairRow(*_setting(found), one, other, both.kl, kl, both.dnll, dnll))
    return sorted(rows, key=lambda row: -abs(row.kl_interaction))


def _setting(found: Measured) -> tuple[str, str, str, str, str]:
    return found.text, found.corpus, found.format, found.activations, found.quantizer
