"""fp4graph inspect: which linears a selector picks, before anything is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import torch

import fp4graph
from fp4graph import models
from fp4graph.cli.common import DTYPES, dtype_option, json_option, output, print_json, stderr

if TYPE_CHECKING:
    from fp4graph import Report

_LENGTH = 8


@click.command("inspect")
@click.argument("model")
@click.option("--select", default="all", show_default=True, help="Selector.")
@click.option("--format", "format_name", default="nvfp4", show_default=True, help="FP4 format.")
@click.option("--activations", type=click.Choice(["none", "same", "int8"]), default="none")
@click.option("--kernel", default="auto", show_default=True, help="Kernel.")
@dtype_option
@json_option
def inspect_command(
    model: str,
    select: str,
    format_name: str,
    activations: str,
    kernel: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Print every linear of MODEL: role, block, shape, and what SELECT would make of it.

    MODEL is a Hub id, a folder, a GGUF file, smollm2-135m, or qwen2.5-SIZE-random. The model is
    run once, dense, to trace it; nothing is packed.
    """
    fp4graph.Selector(select)  # before minutes of loading
    fp4graph.Scheme.of(format_name, kernel=kernel)
    with stderr.status(f"loading {model}"):
        loaded = models.load(model, DTYPES[dtype])
    with stderr.status(f"tracing {model}"):
        report: Report = fp4graph.explain(
            loaded.model,
            torch.arange(_LENGTH)[None],
            select=select,
            format=format_name,
            activations=None if activations == "none" else activations,
            kernel=kernel,
            use_cache=False,
        )
    if as_json:
        for row in report:
            print_json(row)
    console = output(as_json=as_json)
    console.print(report.table())
