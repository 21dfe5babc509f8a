"""The Triton kernels as ops. Triton itself is imported at the first call."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4graph.formats import FORMATS, BlockFormat
from fp4graph.kernels.contract import Kernel, Plan, Problem
from fp4graph.kernels.target import target_of
from fp4graph.kernels.triton import layout, tiles

if TYPE_CHECKING:
    from collections.abc import Callable

    Op = torch._ops.OpOverload[..., Tensor]

_LIBRARY = torch.library.Library("fp4graph", "FRAGMENT")
DTYPES = (torch.bfloat16, torch.float16)
OLDEST = 80  # bfloat16 in tensor cores


def body(format: BlockFormat, **options: Any) -> Callable[..., Tensor]:
    """Return what `fp4graph::triton_<format>` runs; `options` are those of `launch.linear`."""

    def linear(
        x: Tensor, qdata: Tensor, scale: Tensor, row_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        from fp4graph.kernels.triton import launch

        programs = tiles.programs(target_of(x.device))
        return launch.linear(x, qdata, scale, row_scale, bias, format, programs=programs, **options)

    return linear


def define(name: str, packed: str, run: Callable[..., Tensor]) -> Op:
    """Register `fp4graph::<name>(x, <packed>, row_scale, bias)` for CUDA and ROCm."""
    tensors = "".join(f"Tensor {each}, " for each in packed.split())
    _LIBRARY.define(f"{name}(Tensor x, {tensors}Tensor row_scale, Tensor? bias) -> Tensor")

    def on_its_device(x: Tensor, *rest: Tensor) -> Tensor:
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever x is on
            return run(x, *rest)

    def fake(x: Tensor, *rest: Tensor) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[-2].shape[0]))

    _LIBRARY.impl(name, on_its_device, "CUDA")
    torch.library.register_fake(f"fp4graph::{name}", fake, lib=_LIBRARY)
    op: Op = getattr(torch.ops.fp4graph, name).default
    return op


def refuses(problem: Problem) -> str | None:
    """Say what else than dtype and kind of device keeps Triton kernels from a problem."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'fp4graph[triton]'"
    if 0 < problem.target.capability < OLDEST:
        return f"it needs sm_{OLDEST} or newer, and this is {problem.target.arch}"
    return problem.autocast_refusal


def _plan(problem: Problem) -> Plan:
    programs = tiles.programs(problem.target)
    shape = problem.out_features, problem.in_features
    found = [f"M={rows}: {tiles.choose(rows, *shape, programs)}" for rows in (1, 16, 64)]
    many = f"M>{tiles.MOST_ROWS}: dequantised at each call, then F.linear"
    return Plan("qdata and scale as they are, a scale a row", "; ".join([*found, many]))


TRITON = Kernel(
    name="triton",
    ops={
        base: define(f"triton_{base}", "qdata scale", body(format))
        for base, format in FORMATS.items()
    },
    prepack=lambda packed, _: layout.pack(packed),
    dtypes=DTYPES,
    backends=("cuda", "hip"),
    refuses=refuses,
    plan=_plan,
)
