"""fp4graph additivity: whether the damage of a set is the sum of its linears' own."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path

import click
import torch
from rich import box
from rich.table import Table

from fp4graph import TracedModel
from fp4graph.cli.common import (
    dtype_option,
    json_option,
    load_model,
    open_results,
    output,
    picture_option,
    print_json,
    weights_option,
)
from fp4graph.study.additivity import PairRow, SetRow, pairs, sets
from fp4graph.study.measured import measured, setting_of
from fp4graph.study.plot_scores import draw_points

_SHOWN = 40
_MANY = 30


@click.command("additivity")
@click.argument("model")
@click.argument("results", type=click.Path(path_type=Path))
@picture_option
@dtype_option
@weights_option
@json_option
def additivity_command(
    model: str, results: Path, picture: Path | None, dtype: str, as_json: bool
) -> None:
    """Compare what RESULTS (a folder of `ablate`) have of sets of MODEL's linears with sums.

    A trial of several linears is set beside the sum of its linears' own trials (`--plan grid`
    measures those), and a trial of two sets together beside the sum of both.
    """
    store = open_results(results)
    loaded = load_model(model, dtype)
    traced = TracedModel(loaded.model)
    with torch.no_grad():
        traced(input_ids=torch.zeros(1, 8, dtype=torch.int64, device="cpu"), use_cache=False)
    console = output(as_json=as_json)
    points = {}
    for found in measured(store, loaded.revision(), traced.tags):
        whole, two = sets(found), pairs(found)
        if as_json:
            for row in map(asdict, itertools.chain[SetRow | PairRow](whole, two)):
                print_json({**setting_of(found), **row})
        mode = found.activations.mode
        title = f"{found.format} {mode} {found.quantizer}, text {found.text}"
        if whole:
            points[title] = [(row.kl_sum, row.kl, _size(row)) for row in whole]
            console.print(_sets(whole, title))
        if two:
            console.print(_pairs(two, title))
    if not points:
        console.print("no set to compare: single linears are measured by `ablate --plan grid`")
    elif picture is not None:
        draw_points(points, "KL, nats, over the sum of the linears' own", picture, equal=True)


def _size(row: SetRow) -> str:
    return f"2 to {_MANY - 1} linears" if row.linears < _MANY else f"{_MANY} and more"


def _sets(rows: list[SetRow], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("set", no_wrap=True, max_width=48)
    for name in ("linears", "KL", "sum", "ratio", "dNLL", "+-", "sum", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:_SHOWN]:
        table.add_row(
            row.name,
            str(row.linears),
            f"{row.kl:.4f}",
            f"{row.kl_sum:.4f}",
            _ratio(row.kl, row.kl_sum),
            f"{row.dnll:+.4f}",
            "" if row.dnll_se is None else f"{row.dnll_se:.4f}",
            f"{row.dnll_sum:+.4f}",
            _ratio(row.dnll, row.dnll_sum),
        )
    table.caption = "sum: of each linear's own trial; ratio: measured over sum"
    return table


def _pairs(rows: list[PairRow], title: str) -> Table:
    table = Table(title=f"{title}: the largest interactions", box=box.SIMPLE_HEAD)
    for name in ("one", "other"):
        table.add_column(name, no_wrap=True, max_width=48)
    for name in ("KL of both", "above the sum", "dNLL of both", "above the sum"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:_SHOWN]:
        table.add_row(
            row.first,
            row.second,
            f"{row.kl:.4f}",
            f"{row.kl_interaction:+.4f}",
            f"{row.dnll:+.4f}",
            f"{row.dnll_interaction:+.4f}",
        )
    return table


def _ratio(value: float, total: float) -> str:
    return f"{value / total:.2f}" if total else ""
