"""fp4graph outliers: how far the values of linears' inputs and weights reach."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich import box
from rich.table import Table

from fp4graph.cli.common import (
    device_option,
    dtype_option,
    json_option,
    load_windows,
    open_results,
    output,
    picture_option,
    print_json,
    weights_option,
    windows_bar,
)
from fp4graph.cli.correlation_table import show_correlations
from fp4graph.linears.tags import Role
from fp4graph.study.correlation import correlate
from fp4graph.study.measured import Measured, measured
from fp4graph.study.outliers import OutlierRow, Outliers, by_role, outliers
from fp4graph.study.plot_scores import draw_cells

if TYPE_CHECKING:
    import torch

    from fp4graph.study.correlation import Correlation


@click.command("outliers")
@click.argument("model")
@click.option("--corpus", default="pydoc", show_default=True, help="pydoc, a file, or hf:DATASET.")
@click.option("--tokens", type=click.IntRange(min=2), default=4096, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Results of `ablate --plan grid`: say how outliers and damage go together.",
)
@picture_option
@dtype_option
@weights_option
@device_option
@json_option
def outliers_command(
    model: str,
    corpus: str,
    tokens: int,
    seq_len: int,
    against: Path | None,
    picture: Path | None,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Show the outliers of MODEL's linears' inputs and weights, on a text, by role."""
    store = None if against is None else open_results(against)
    loaded, windows = load_windows(model, corpus, tokens, seq_len, dtype, device)
    with windows_bar(len(windows.ids)) as progress:
        found = outliers(loaded, windows, progress)
    rows = list(found.values())
    if as_json:
        for row in rows:
            print_json(row)
    title = f"{model}, {corpus}, {tokens} tokens"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("role")
    names = ("P99.9", "max", "max/P99.9", "kurtosis", "RMS", "outlier channels")
    for name in (*names, *(f"weight {name}" for name in names[:-1])):
        table.add_column(name, justify="right")
    for role, (inputs, weights) in by_role(rows).items():
        table.add_row(role, *_cells(inputs), str(inputs.outlier_channels), *_cells(weights))
    table.caption = "inputs first, then weights; means over the linears of a role"
    console = output(as_json=as_json)
    console.print(table)
    if picture is not None:
        cells = {(r.role, r.block): math.log10(r.input.ratio) for r in rows if r.block is not None}
        draw_cells({title: cells}, "log10 of max/P99.9", picture)
    if store is None:
        return
    scores = _scores(rows, measured(store, loaded.revision(), list(found)))
    title = "outliers against measured trials of one linear"
    show_correlations(scores, title, as_json=as_json)


def _cells(found: Outliers) -> list[str]:
    values = (found.p999, found.max, found.ratio, found.kurtosis, found.rms)
    return [f"{value:.3g}" for value in values]


def _scores(rows: list[OutlierRow], settings: list[Measured]) -> list[Correlation]:
    """Compare every statistic with the damage, with and without the role whose outliers stand out.

    2603.08747 takes outliers to explain `down` and nothing else.
    """
    roles = {row.path: row.role for row in rows}
    inputs = {row.path: asdict(row.input) for row in rows}
    weights = {row.path: asdict(row.weight) for row in rows}
    predictors = {
        f"{what} {name}": {path: float(values[name]) for path, values in statistics.items()}
        for what, statistics in (("input", inputs), ("weight", weights))
        for name in _STATISTICS
    }
    return [
        score
        for setting in settings
        for without in (None, Role.DOWN)
        for score in correlate(predictors, setting, roles, without)
    ]


_STATISTICS = ("p999", "max", "ratio", "kurtosis", "rms")
