"""What this machine has, what it lacks, and what would be gained by what."""

from __future__ import annotations

import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

import fp4graph
from fp4graph import models
from fp4graph.cache import cache_folder
from fp4graph.kernels import target_of
from fp4graph.kernels.cpu import Native, library, load
from fp4graph.kernels.cpu.build import BuildError, find_compiler
from fp4graph.machine import processor
from fp4graph.memory import available


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


def findings() -> list[Finding]:
    """Look at everything that decides what runs here, and how fast."""
    return [
        Finding("fp4graph", fp4graph.__version__),
        Finding("python, torch", f"{platform.python_version()}, {torch.__version__}"),
        Finding("transformers", version("transformers")),
        Finding("processor", processor()),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs"),
        _memory(),
        _compiler(),
        *_native(),
        _triton(),
        _gpu(),
        Finding("cache", str(cache_folder())),
        _demo_model(),
        *_extras(),
    ]


def _memory() -> Finding:
    free = available(torch.device("cpu"))
    total = psutil.virtual_memory().total
    billions = free / 4 / 1e9
    return Finding(
        "memory",
        f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}: dense models of up to about "
        f"{billions:.1f} billion parameters in float32, {2 * billions:.1f} in bfloat16",
    )


_EXTRAS = {
    "lm_eval": ("eval", "fp4graph tasks: accuracy on benchmarks"),
    "datasets": ("datasets", "--corpus hf:NAME"),
    "pyarrow": ("parquet", "export-results to .parquet"),
    "pandas": ("pandas", "to_pandas() of tables and reports"),
}
"""Packages that are optional: with which extra they come, and what they give."""


def _extras() -> list[Finding]:
    found = []
    for package, (extra, gain) in _EXTRAS.items():
        try:
            found.append(Finding(package, version(package)))
        except PackageNotFoundError:
            advice = f"pip install 'fp4graph[{extra}]' gives {gain}"
            found.append(Finding(package, "not installed", advice))
    return found


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
        Finding(
            "instruction set",
            f"{found.isa}{why}: the best that this processor has"
            if found.isa == found.isas[0]
            else f"{found.isa}{why}; it also has {', '.join(found.isas)}",
        ),
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
