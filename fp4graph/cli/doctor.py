"""fp4graph doctor: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import click
import torch
from rich import box
from rich.table import Table

import fp4graph
from fp4graph import models
from fp4graph.cache import cache_folder
from fp4graph.cli.common import json_option, output, print_json
from fp4graph.kernels import target_of
from fp4graph.kernels.cpu import Native, library, load
from fp4graph.kernels.cpu.build import BuildError, find_compiler


@dataclass(frozen=True)
class Finding:
    """One thing looked at; the fields are the keys of the JSON lines.

    Attributes:
        what: the thing.
        found: what there is.
        advice: what to do about what is missing; empty where nothing is.
    """

    what: str
    found: str
    advice: str = ""


@click.command("doctor")
@json_option
def doctor_command(*, as_json: bool) -> None:
    """Say which kernels this machine can run, and what to install for those that it cannot."""
    findings = [
        Finding("fp4graph", fp4graph.__version__),
        Finding("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        _compiler(),
        *_native(),
        _triton(),
        _gpu(),
        Finding("cache", str(cache_folder())),
        _demo_model(),
    ]
    if as_json:
        for finding in findings:
            print_json(finding)
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "found", "to do"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, finding.found, finding.advice)
    output(as_json=False).print(table)


def _compiler() -> Finding:
    try:
        return Finding("C++ compiler", find_compiler())
    except BuildError as error:
        return Finding("C++ compiler", "none", str(error))


def _native() -> list[Finding]:
    asked = os.environ.get(library.ISA_VARIABLE)
    if library.find() is None and asked != library.NO_NATIVE:
        advice = "pip install --no-build-isolation, or any use of them, builds them in a minute"
        return [Finding("native CPU kernels", "not built yet", advice)]
    found = load()
    if not isinstance(found, Native):
        advice = "FP4 weights are dequantised once: right, but no faster or smaller than dense"
        return [Finding("native CPU kernels", found.reason, advice)]
    why = f", as {library.ISA_VARIABLE} says" if asked else ""
    return [
        Finding("native CPU kernels", f"{found.origin}: {found.path}"),
        Finding("instruction set", f"{found.isa}{why}, of {', '.join(found.isas)}"),
    ]


def _triton() -> Finding:
    try:
        return Finding("Triton", version("triton"))
    except PackageNotFoundError:
        advice = "pip install 'fp4graph[triton]'" if torch.cuda.is_available() else ""
        return Finding("Triton", "not installed", advice)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none that torch sees")
    count = range(torch.cuda.device_count())
    names = {
        f"{torch.cuda.get_device_name(index)} ({target_of(torch.device('cuda', index))})"
        for index in count
    }
    return Finding("GPU", ", ".join(sorted(names)))


def _demo_model() -> Finding:
    if importlib.util.find_spec(models.SMOLLM2_PACKAGE):
        return Finding(models.SMOLLM2, "installed")
    return Finding(models.SMOLLM2, "not installed", models.SMOLLM2_INSTALL)
