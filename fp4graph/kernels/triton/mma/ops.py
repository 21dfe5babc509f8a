"""The fragment kernels as ops. Triton itself is imported at the first call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp4graph.formats import FP4_FORMATS, BlockFormat
from fp4graph.kernels.contract import Kernel, Plan, Problem
from fp4graph.kernels.target import Target, target_of
from fp4graph.kernels.triton.mma import layout
from fp4graph.kernels.triton.mma.kept import cut_for
from fp4graph.kernels.triton.ops import DTYPES, define, refuses

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def body(
    format: BlockFormat, target: Target | None = None, **options: Any
) -> Callable[..., Tensor]:
    """Return what `fp4graph::triton_fragments_<format>` runs; `options` as in `launch.linear`."""

    def linear(x: Tensor, stream: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
        from fp4graph.kernels.triton.mma import launch

        on = target or target_of(x.device)
        order = layout.order_of(x.dtype, on)
        return launch.linear(x, stream, row_scale, bias, order, format.block_size, on, **options)

    return linear


_RECORD = (layout.ROWS, layout.COLUMNS)


def _order(problem: Problem) -> layout.Order:
    return layout.order_of(problem.dtype, problem.target)


def _plan(problem: Problem) -> Plan:
    shape = problem.out_features, problem.in_features
    cuts = [f"M={rows}: {cut_for(rows, *shape, problem.target)}" for rows in (1, 16, 64, 256)]
    N, K = (-(-size // by) * by for size, by in zip(shape, _RECORD, strict=True))
    return Plan(f"MMA fragments, {_order(problem).bits} bits", "; ".join(cuts), (N, K))


FRAGMENTS = Kernel(
    name="triton_fragments",
    ops={
        base: define(f"triton_fragments_{base}", "stream", body(format))
        for base, format in FP4_FORMATS.items()
    },
    prepack=lambda packed, problem: layout.pack(packed, _order(problem)),
    dtypes=DTYPES,
    backends=("cuda",),
    refuses=refuses,
    plan=_plan,
)
