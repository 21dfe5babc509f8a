"""fp4graph convert: a folder of packed weights, which loads in a fraction of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

import fp4graph
from fp4graph.cli.common import output, stderr
from fp4graph.cli.options import (
    allowed_weights,
    device_option,
    one_selection,
    packing_options,
    weights_option,
)
from fp4graph.errors import ModelError

if TYPE_CHECKING:
    import torch


@click.command("convert", short_help="Write a folder of packed weights.")
@click.argument("model")
@packing_options
@click.option(
    "--on-refusal",
    type=click.Choice(["raise", "keep"]),
    default="raise",
    show_default=True,
    help="What to do with a selected linear that cannot be converted.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of what stays dense.  [default: the checkpoint's own]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="A new folder.",
)
@weights_option
@device_option
def convert_command(
    model: str,
    select: str | None,
    mix: Path | None,
    format: str,
    quantizer: str,
    activations: str,
    calibration: Path | None,
    on_refusal: str,
    dtype: str | None,
    out: Path,
    device: torch.device,
) -> None:
    """Load MODEL with its selected linears in FP4, and write it to OUT, whole or not at all.

    Each tensor is read, quantised and freed before the next. OUT loads by fp4graph.load(OUT), and
    by transformers' from_pretrained once fp4graph.FP4Config was imported.
    """
    import torch

    from fp4graph.loading import load, save
    from fp4graph.models import locate, tokenizer_of

    what = one_selection(select, mix) or "all"
    if out.exists():
        raise ModelError(f"{out} is there already: give the name of a new folder")
    with stderr.status(f"loading {model}"):
        loaded = load(
            model,
            what,
            dtype=None if dtype is None else getattr(torch, dtype),
            device=device,
            allow_weights=allowed_weights(),
            format=format,
            quantizer=quantizer,
            activations=activations,
            calibration=calibration,
            on_refusal=on_refusal,
        )
        save(loaded, out, tokenizer_of(*locate(model)))
    report = fp4graph.report_of(loaded)
    console = output(as_json=False)
    console.print(report.by_role())
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"{size / 1e6:.1f} MB in {out}", markup=False)
