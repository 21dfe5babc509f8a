"""fp4graph additivity: whether the damage of a set is the sum of its linears' own."""

from __future__ import annotations

from pathlib import Path

import click

import fp4graph
from fp4graph.cli.common import load_model, print_table
from fp4graph.cli.options import dtype_option, json_option, picture_option, weights_option


@click.command("additivity", short_help="Say whether damages add up.")
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
    from fp4graph.study.results import open_results

    open_results(results).close()  # before a model is loaded
    table = fp4graph.study.additivity(load_model(model, dtype), results)
    print_table(table, as_json=as_json)
    if picture is not None:
        table.draw(picture)
