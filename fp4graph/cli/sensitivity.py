"""fp4graph sensitivity: what FP4 in each linear will cost, from one run of the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import load_windows, print_table, progress_shown
from fp4graph.cli.options import (
    CommaList,
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


@click.command("sensitivity", short_help="Score every linear without trying each.")
@click.argument("model")
@click.option("--format", type=CommaList(), default="nvfp4", show_default=True)
@click.option("--activations", type=CommaList(), default="none", show_default=True,
              help="none is W4A16, same is W4A4.")  # fmt: skip
@click.option("--quantizer", default="rtn", show_default=True, help="One that needs no data.")
@text_options(2048, 128)
@click.option(
    "--samples",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Random backward passes a window.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Results of `ablate --plan grid`: say how well each score tells what was measured.",
)
@picture_option
@dtype_option
@weights_option
@stream_option
@device_option
@json_option
def sensitivity_command(
    model: str,
    format: tuple[str, ...],
    activations: tuple[str, ...],
    quantizer: str,
    corpus: str,
    tokens: int,
    seq_len: int,
    samples: int,
    against: Path | None,
    picture: Path | None,
    dtype: str,
    device: torch.device,
    as_json: bool,
) -> None:
    """Score MODEL's block linears by what FP4 in them will cost, without trying each.

    One run over the text and a few backward passes take the place of a run for every linear.
    """
    from fp4graph.study.results import open_results
    from fp4graph.study.sensitivity import schemes_of

    schemes_of(format, activations, quantizer)  # before a model is loaded
    if against is not None:
        open_results(against).close()
    loaded, windows = load_windows(model, corpus, tokens, seq_len, dtype, device)
    with progress_shown() as progress:
        table = fp4graph.study.sensitivity(
            loaded,
            windows,
            format,
            activations,
            quantizer,
            samples=samples,
            against=against,
            corpus=corpus,
            progress=progress,
        )
    print_table(table, as_json=as_json)
    if picture is not None:
        table.draw(picture)
