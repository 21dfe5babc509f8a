"""The table of how well scores tell what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from fp4graph.cli.common import output, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.study.correlation import Correlation


def show_correlations(rows: Sequence[Correlation], title: str, *, as_json: bool) -> None:
    """Print correlations, as JSON lines if asked, and as a table."""
    if as_json:
        for row in rows:
            print_json(row)
    output(as_json=as_json).print(_table(rows, title))


def _table(rows: Sequence[Correlation], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    names = ("predictor", "measured", "format", "mode", "quantizer", "without", "linears")
    for name in names:
        table.add_column(name, no_wrap=True)
    table.add_column("Spearman", justify="right", no_wrap=True)
    table.add_column("Pearson", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.predictor,
            row.target,
            row.format,
            row.activations.mode,
            row.quantizer,
            row.without or "",
            str(row.linears),
            f"{row.spearman:.3f} [{row.spearman_low:.3f}, {row.spearman_high:.3f}]",
            f"{row.pearson:.3f} [{row.pearson_low:.3f}, {row.pearson_high:.3f}]",
        )
    table.caption = "95 % intervals: linears drawn with repeats"
    if not rows:
        table.caption = "nothing to compare: the results have fewer than five trials of one linear"
    return table
