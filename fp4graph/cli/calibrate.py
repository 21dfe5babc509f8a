"""fp4graph calibrate: better codes, found with data."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import fp4graph
from fp4graph import models
from fp4graph.cli.common import (
    check_interrupt,
    device_option,
    dtype_option,
    load_windows,
    output,
    progress_bar,
    weights_option,
)
from fp4graph.quantizers import DAMPING, NEED_DATA, Quantizer

if TYPE_CHECKING:
    import torch


@click.command("calibrate")
@click.argument("model")
@click.option("--select", default="all", show_default=True, help="Selector.")
@click.option("--format", default="nvfp4", show_default=True)
@click.option(
    "--quantizer",
    default="gptq:scale-search",
    show_default=True,
    help=f"{', '.join(NEED_DATA)}; behind it @32 and the like for weight and input rotated, "
    "or +smooth for SmoothQuant, behind a data-free one too.",
)
@click.option(
    "--corpus",
    default="pydoc-first",
    show_default=True,
    help="pydoc-first, a file, or hf:DATASET; never what is measured on later.",
)
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--seq-len", type=click.IntRange(min=2), default=512, show_default=True)
@click.option("--damping", type=click.FloatRange(0, 1), default=DAMPING, show_default=True)
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
    help="The file, .safetensors.",
)
@dtype_option
@weights_option
@device_option
def calibrate_command(
    model: str,
    select: str,
    format: str,
    quantizer: str,
    corpus: str,
    samples: int,
    seq_len: int,
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
    fp4graph.Selector(select)
    Quantizer.parse(quantizer, fp4graph.get_format(format))
    loaded, windows = load_windows(model, corpus, samples * seq_len, seq_len, dtype, device)
    models.check_length(loaded.model, seq_len)
    with progress_bar() as bar:
        task = bar.add_task("blocks", total=None)

        def progress(done: int, total: int) -> None:
            check_interrupt()
            bar.update(task, completed=done, total=total)

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
            select,
            format=format,
            quantizer=quantizer,
            damping=damping,
            propagate=propagate,
            out=out,
            about=about,
            progress=progress,
        )
    console = output(as_json=False)
    console.print(f"{len(found.packed)} linears, {found.format}, {found.quantizer}: {out}")


def _map_large_tensors() -> None:
    """Let glibc map each larger tensor by itself: what it gives back for others leaves holes."""
    if sys.platform == "linux":
        adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if adjust is not None:
            adjust(_MMAP_THRESHOLD, 1 << 22)


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
