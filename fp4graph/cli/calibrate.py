"""fp4graph calibrate: better codes, found with data."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

import fp4graph
from fp4graph.cli.common import load_windows, output, progress_shown
from fp4graph.cli.options import (
    device_option,
    dtype_option,
    one_selection,
    stream_option,
    weights_option,
)
from fp4graph.errors import OptionError

if TYPE_CHECKING:
    import torch


def _check_out(ctx: click.Context, param: click.Parameter, path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise OptionError(f"--out {path}: expected a name that ends with .safetensors")
    return path


@click.command("calibrate", short_help="Find better codes, with data.")
@click.argument("model")
@click.option("--select", help="A selector, or a mapping in JSON.  [default: all]")
@click.option(
    "--mix",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A .toml file with a table [select]: selector to format, or to format and quantizer.",
)
@click.option("--format", default="nvfp4", show_default=True)
@click.option(
    "--quantizer",
    default="gptq:scale-search",
    show_default=True,
    help="gptq, gptq:scale-search, distilled, mr-gptq, weighted-scale-search, ...; behind it @32 "
    "and the like for weight and input rotated, or +smooth for SmoothQuant: docs/numerics.md.",
)
@click.option(
    "--activations",
    type=click.Choice(["none", "same"]),
    default="none",
    show_default=True,
    help="same: inputs are rounded too while codes are found, for W4A4.",
)
@click.option(
    "--corpus",
    default="pydoc-first",
    show_default=True,
    help="pydoc-first, a file, or hf:DATASET; never what is measured on later.",
)
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True)
@click.option(
    "--serve",
    type=click.Choice(["vllm", "sglang"]),
    help="Linears that this engine computes as one get one per-tensor scale.",
)
@click.option("--damping", type=click.FloatRange(0, 1), default=0.01, show_default=True)
@click.option(
    "--propagate/--no-propagate",
    default=True,
    show_default=True,
    help="Whether a block sees what the rounded blocks before it give.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    callback=_check_out,
    help="The file, .safetensors.",
)
@dtype_option
@weights_option
@stream_option
@device_option
def calibrate_command(
    model: str,
    select: str | None,
    mix: Path | None,
    format: str,
    quantizer: str,
    activations: str,
    corpus: str,
    samples: int,
    seq_len: int,
    serve: str | None,
    damping: float,
    propagate: bool,
    out: Path,
    dtype: str,
    device: torch.device,
) -> None:
    """Find codes for MODEL's selected linears with data, for `ablate --calibration`.

    A run that was stopped, by whatever means, goes on after the last whole block when the same
    command is given again.
    """
    _map_large_tensors()
    from fp4graph.calibration.calibrate import policy_for

    what = one_selection(select, mix) or "all"
    policy_for(what, format, quantizer, activations)  # before a model is loaded
    loaded, windows = load_windows(model, corpus, samples * seq_len, seq_len, dtype, device)
    fp4graph.models.check_length(loaded.model, seq_len)
    with progress_shown() as shown:
        about: dict[str, Any] = {
            "model": model,
            "revision": loaded.revision(),
            "corpus": corpus,
            "text": windows.digest(),
            "samples": len(windows.ids),
            "seq_len": seq_len,
            "fp4graph": fp4graph.__version__,
        }
        found = fp4graph.calibrate(
            loaded.model,
            windows.ids.to(device).split(1),
            what,
            format=format,
            quantizer=quantizer,
            activations=activations,
            serve=serve,
            damping=damping,
            propagate=propagate,
            out=out,
            about=about,
            progress=shown.counted("blocks"),
        )
    ways = " and ".join(f"{each}, {how}" for each, how in found.ways)
    console = output(as_json=False)
    console.print(f"{len(found.packed)} linears, {ways}: {out}", markup=False)
    errors = list(found.about["output_error"].values())
    nearest, now = (fmean(pair[which] for pair in errors) for which in (0, 1))
    if nearest > 0:
        console.print(
            f"=> output error on that text, squared, over the output's square: {nearest:.2e} to "
            f"nearest, {now:.2e} now ({1 - now / nearest:.0%} gone), a mean over linears",
            markup=False,
        )
    asked = f"--mix {mix}" if mix else f"--select '{what}'"
    console.print(
        f"next: fp4graph ablate {model} {asked} --calibration {out}", markup=False, soft_wrap=True
    )


def _map_large_tensors() -> None:
    """Let glibc map each larger tensor by itself: what it gives back for others leaves holes."""
    if sys.platform == "linux":
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if adjust is not None:
            adjust(_MMAP_THRESHOLD, 1 << 22)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
