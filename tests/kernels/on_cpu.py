"""GPU kernels on CPU tensors, for tests: their ops get an implementation that needs no GPU."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch

from fp4graph.formats import FORMATS, FP4_FORMATS
from fp4graph.kernels import Target
from fp4graph.kernels.triton import mma, ops

STAND_IN = Target("cuda", "sm_90", 1)
"""The target that the implementations run as."""


@cache
def run_triton_ops_on_cpu() -> torch.library.Library | None:
    """Register the implementations, as long as what is returned lives; cached, so for good."""
    if importlib.util.find_spec("triton") is None:
        return None
    library = torch.library.Library("fp4graph", "IMPL")
    for base, format in FORMATS.items():
        portable = ops.body(format, run=stand_in(STAND_IN))
        library.impl(f"triton_{base}", portable, "CPU")
    for base, format in FP4_FORMATS.items():
        fast = mma.ops.body(format, STAND_IN, run=stand_in(STAND_IN))
        library.impl(f"triton_fragments_{base}", fast, "CPU")
    return library


def stand_in(target: Target) -> Any:
    """Return a `run=` that interprets plain Triton, and emulates the PTX of Gluon."""
    from kernels.emulator import Emulator
    from kernels.triton_interpreter import interpret
    from triton.experimental.gluon._runtime import GluonJITFunction

    emulate = Emulator(target)
    return lambda kernel: (emulate if isinstance(kernel, GluonJITFunction) else interpret)(kernel)
