"""How well something that is cheap to compute tells what was measured, linear by linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import rankdata

from fp4graph.study.statistics import bootstrap
from fp4graph.study.trial import mode_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp4graph.study.measured import Measured

    Floats = np.ndarray[Any, np.dtype[np.float64]]

TARGETS = ("kl", "dnll")
_FEWEST = 5


@dataclass(frozen=True)
class Correlation:
    """One predictor against one measured quantity; the fields are the keys of the JSON lines.

    Attributes:
        predictor: its name.
        target: `kl` or `dnll` of the trials of single linears.
        text: hash of the text that those were scored on.
        corpus: what that text is called.
        format: of the weights.
        activations: `none` or `same`.
        quantizer: how the codes were found.
        without: role that was left out, or None.
        linears: how many were compared.
        spearman: correlation of ranks.
        spearman_low: lower end of its 95 % interval, linears drawn with repeats.
        spearman_high: upper end.
        pearson: linear correlation.
        pearson_low: lower end of its interval.
        pearson_high: upper end.
    """

    predictor: str
    target: str
    text: str
    corpus: str
    format: str
    activations: str
    quantizer: str
    without: str | None
    linears: int
    spearman: float
    spearman_low: float
    spearman_high: float
    pearson: float
    pearson_low: float
    pearson_high: float

    @property
    def activation_mode(self) -> str:
        """The field's name for its activations, as in `OfTrial`."""
        return mode_of(self.format, self.activations)


def correlate(
    predictors: Mapping[str, Mapping[str, float]],
    found: Measured,
    roles: Mapping[str, str],
    without: str | None = None,
) -> list[Correlation]:
    """Compare predictors with the measured trials of single linears.

    Args:
        predictors: values by the path of a linear, by the predictor's name.
        found: the trials.
        roles: of linears by their paths.
        without: role to leave out.

    Returns:
        a row for each predictor and target; none if fewer than five linears have both.
    """
    singles = {path: row for path, row in found.singles.items() if roles.get(path) != without}
    rows = []
    for name, values in predictors.items():
        paths = [path for path in singles if path in values]
        if len(paths) < _FEWEST:
            continue
        x = np.array([values[path] for path in paths])
        for target in TARGETS:
            y = np.array([getattr(singles[path], target) for path in paths])
            how = (
                found.text,
                found.corpus,
                found.format,
                found.activations,
                found.quantizer,
                without,
            )
            ranks = _with_interval(x, y, ranked=True)
            linear = _with_interval(x, y, ranked=False)
            rows.append(Correlation(name, target, *how, len(paths), *ranks, *linear))
    return rows


def _with_interval(x: Floats, y: Floats, *, ranked: bool) -> tuple[float, float, float]:
    whole = float(_correlation(x[None], y[None], ranked=ranked)[0])
    return whole, *bootstrap(len(x), lambda drawn: _correlation(x[drawn], y[drawn], ranked=ranked))


def _correlation(x_RN: Floats, y_RN: Floats, *, ranked: bool) -> Floats:
    """Return a correlation for each row; 0 where one of both does not vary."""
    if ranked:
        x_RN, y_RN = rankdata(x_RN, axis=1), rankdata(y_RN, axis=1)
    x_RN = x_RN - x_RN.mean(1, keepdims=True)
    y_RN = y_RN - y_RN.mean(1, keepdims=True)
    scale = np.sqrt((x_RN**2).sum(1) * (y_RN**2).sum(1))
    product: Floats = (x_RN * y_RN).sum(1) / np.where(scale > 0, scale, 1)
    return product
