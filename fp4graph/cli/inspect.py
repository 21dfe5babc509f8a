"""fp4graph inspect: which linears a selector picks, before anything is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import torch

import fp4graph
from fp4graph.cli.common import (
    DTYPES,
    json_option,
    load_model,
    output,
    print_json,
    stderr,
    weights_option,
)
from fp4graph.kernels import parse_target

if TYPE_CHECKING:
    from fp4graph import Report

_LENGTH = 8


@click.command("inspect")
@click.argument("model")
@click.option("--select", default="all", show_default=True, help="Selector.")
@click.option("--format", "format_name", default="nvfp4", show_default=True, help="FP4 format.")
@click.option("--quantizer", default="rtn", show_default=True, help="How codes are found.")
@click.option("--activations", type=click.Choice(["none", "same", "int8"]), default="none")
@click.option("--kernel", default="auto", show_default=True, help="Kernel.")
@click.option(
    "--device",
    help="Choose kernels for a device that need not be here: cpu, cuda:sm_80, cuda:sm_90, "
    "cuda:sm_100, cuda:sm_120, hip:gfx942, hip:gfx950.",
)
@click.option(
    "--dtype",
    type=click.Choice(list(DTYPES)),
    help="Dtype of the model: float32, or bfloat16 on a GPU, if left out.",
)
@weights_option
@json_option
def inspect_command(
    model: str,
    select: str,
    format_name: str,
    quantizer: str,
    activations: str,
    kernel: str,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    """Print every linear of MODEL: role, block, shape, and what SELECT would make of it.

    MODEL is a Hub id, a folder, a GGUF file, smollm2-135m, or qwen2.5-SIZE-random. The model is
    run once, dense, to trace it; nothing is packed.
    """
    fp4graph.Selector(select)  # before minutes of loading
    fp4graph.Scheme.of(format_name, quantizer, activations, kernel)
    on_gpu = device is not None and parse_target(device).backend != "cpu"
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    loaded = load_model(model, dtype)
    with stderr.status(f"tracing {model}"):
        report: Report = fp4graph.explain(
            loaded.model,
            torch.arange(_LENGTH, device="cpu")[None],
            select=select,
            format=format_name,
            quantizer=quantizer,
            activations=activations,
            kernel=kernel,
            device=device,
            use_cache=False,
        )
    if as_json:
        for row in report:
            print_json(row)
    console = output(as_json=as_json)
    console.print(report.table(plans=device is not None))
