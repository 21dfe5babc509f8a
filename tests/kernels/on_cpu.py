"""GPU kernels on CPU tensors, for tests: their ops get an implementation that interprets them."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from fp4graph.formats import FORMATS
from fp4graph.kernels.triton import ops


@cache
def interpret_triton_ops() -> torch.library.Library | None:
    """Register the implementations, as long as what is returned lives; cached, so for good."""
    if importlib.util.find_spec("triton") is None:
        return None
    from kernels.triton_interpreter import interpret

    library = torch.library.Library("fp4graph", "IMPL")
    for base, format in FORMATS.items():
        library.impl(f"triton_{base}", ops.body(format, run=interpret), "CPU")
    return library
