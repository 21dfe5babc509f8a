"""fp4graph gpu-check: is a GPU right, how fast is it, and how is work best cut for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fp4graph.cli.common import FAULT, output, progress_shown
from fp4graph.cli.options import device_option

if TYPE_CHECKING:
    import torch

    from fp4graph.gpu_check.found import Found


@click.command("gpu-check", short_help="Check and time the kernels on this machine's GPU.")
@click.option(
    "--json",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file with all that was found.  [default: gpu-check.json, where there is a GPU]",
)
@device_option
def gpu_check_command(file: Path | None, device: torch.device) -> None:
    """Find out in ten minutes what FP4 kernels do on this machine's GPU.

    Results are compared with float64 on forty shapes. Faults are seeded in packed weights, and
    each must be found. Ways to cut the work are timed, and the fastest are kept for later runs.
    Kernels are timed beside the vendor's, then a whole model, by selector. Exit status 1 if
    anything is wrong.
    """
    from fp4graph.gpu_check.found import Found
    from fp4graph.gpu_check.told import tables, verdict

    said = output(as_json=False)
    if device.type != "cuda":
        found = Found({}, is_measured=False)
        if file is not None:
            _write(found, file)
    else:
        file = file or Path("gpu-check.json")
        found = _checked(device, file)
        for table in tables(found):
            said.print(table)
    for sentence in verdict(found):
        said.print(f"=> {sentence}", markup=False, soft_wrap=True)
    if found.is_measured:
        said.print(_HOW.format(file=file), markup=False, soft_wrap=True)
        sys.exit(0 if found.is_right else FAULT)


_HOW = (
    "{file} has all of it: please attach it to an issue of the project. It names the GPU and the "
    "versions of packages, no host and no user; texts under `errors` may hold paths."
)


def _checked(where: torch.device, file: Path) -> Found:
    from importlib.util import find_spec

    import torch

    from fp4graph.errors import OptionError
    from fp4graph.gpu_check import check

    if find_spec("triton") is None:
        raise OptionError("GPU kernels need a package: pip install 'fp4graph[triton]'")
    from fp4graph.gpu_check.cuda import Cuda

    # kernels are launched on the current GPU, wherever tensors lie
    with torch.cuda.device(where), progress_shown() as progress:
        return check(Cuda(where), save=lambda found: _write(found, file), progress=progress)


def _write(found: Found, file: Path) -> None:
    from fp4graph.files import write_text
    from fp4graph.gpu_check.told import to_json

    write_text(file, json.dumps(to_json(found), indent=1) + "\n")
