"""fp4graph outliers: how far the values of linears' inputs and weights reach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_windows, print_table, progress_shown
from fp4graph.cli.options import (
    device_option,
    dtype_option,
    json_option,
    picture_option,
    stream_option,
    text_options,
    weights_option,
)

if TYPE_CHECKING:
    import torch


@click.command("outliers", short_help="Show outliers of inputs and weights, by role.")
@click.argument("model")
@text_options(4096, 512)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Results of `ablate --plan grid`: say how outliers and damage go together.",
)
@picture_option
@dtype_option
@weights_option
@stream_option
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
    from fp4graph.study.results import open_results

    if against is not None:
        open_results(against).close()  # before a model is loaded
    loaded, windows = load_windows(model, corpus, tokens, seq_len, dtype, device)
    with progress_shown() as progress:
        table = fp4graph.study.outliers(
            loaded, windows, against=against, corpus=corpus, progress=progress
        )
    print_table(table, as_json=as_json)
    if picture is not None:
        table.draw(picture)
