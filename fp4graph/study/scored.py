"""What the scores of a trial come to: its row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fp4graph.study.statistics import interval, mean_and_error
from fp4graph.study.trial import Row

if TYPE_CHECKING:
    from fp4graph import Report
    from fp4graph.study.evaluate import Scores
    from fp4graph.study.trial import Trial


def row_of(trial: Trial, scores: Scores, dense: Scores, report: Report) -> Row:
    """Return a trial's row.

    Args:
        trial: what was scored.
        scores: its model's.
        dense: the dense model's on the same tokens.
        report: of the linears that were in FP4.
    """
    dnll, dnll_se = mean_and_error(scores.nll - dense.nll)
    dnll_low, dnll_high = interval(scores.nll - dense.nll)
    kl, kl_se = mean_and_error(scores.kl)
    kl_p50, kl_p90, kl_p99 = map(float, np.percentile(scores.kl, (50, 90, 99)))
    rows = report.selected
    bytes_dense = sum(row.bytes_dense for row in rows)
    bytes_packed = sum(row.bytes_packed or 0 for row in rows)
    parameters = sum(row.parameters for row in rows)
    saved = max(bytes_dense - bytes_packed, 0)
    return Row(
        **trial.facts,
        ppl=scores.perplexity,
        dnll=dnll,
        dnll_se=dnll_se,
        dnll_low=dnll_low,
        dnll_high=dnll_high,
        kl=kl,
        kl_se=kl_se,
        kl_p50=kl_p50,
        kl_p90=kl_p90,
        kl_p99=kl_p99,
        top1=float(scores.same.mean()),
        linears=len(rows),
        parameters=parameters,
        bytes_dense=bytes_dense,
        bytes_packed=bytes_packed,
        dnll_per_mb=_per_million(dnll, saved),
        kl_per_mb=_per_million(kl, saved),
        dnll_per_mparam=_per_million(dnll, parameters),
        kl_per_mparam=_per_million(kl, parameters),
    )


def _per_million(value: float, count: int) -> float | None:
    return value / (count / 1e6) if count else None
