"""What a kernel is.

A kernel is one `torch.library` op a format, `op(x, *prepack(packed), bias) -> y`, whose meaning is
`F.linear(x, packed.dequantize(x.dtype), bias)` within float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch._ops import OpOverload

    from fp4graph.formats import BlockFormat, PackedWeight
    from fp4graph.kernels.target import Target


Inputs = Literal["exact", "int8", "auto", "same"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Problem:
    """A linear as a kernel sees it; the number of rows of `x` stays open.

    Attributes:
        out_features: N.
        in_features: K.
        format: of the weight.
        dtype: of activations, bias and result.
        target: what all of it lies on.
        inputs: whether activations stay as they are, or the kernel rounds them to 8 bits in
            groups, or it does so by the number of rows; "same" is rounding to the weight's format,
            by the kernel or before it.
        weight_dtype: of the dense weight, where autocast makes it another; else None.
        experts: how many such weights there are, packed alike, of which rows choose one.
    """

    out_features: int
    in_features: int
    format: BlockFormat
    dtype: torch.dtype
    target: Target
    inputs: Inputs = "exact"
    weight_dtype: torch.dtype | None = None
    experts: int = 1

    @property
    def autocast_refusal(self) -> str | None:
        """Why a kernel that never rounds weights to another dtype is not what autocast means."""
        if self.weight_dtype is None:
            return None
        cast = f"{self.weight_dtype} weights to {self.dtype}"
        return f"under autocast the dense linear rounds {cast}, and it never rounds them"


@dataclass(frozen=True)
class Plan:
    """How a kernel goes about a problem, for the report.

    Attributes:
        layout: how the packed weight lies in memory.
        tile: how the work is cut, by the number of rows of `x`.
        padded: shape of the weight, filled up to whole tiles; None where it is not.
    """

    layout: str
    tile: str
    padded: tuple[int, int] | None = None


def _no_refusal(problem: Problem) -> str | None:
    return None


def _nothing_to_settle(problem: Problem) -> None:
    pass


def _as_it_is(problem: Problem) -> Plan:
    return Plan("qdata and scale as they are", "the whole weight")


@dataclass(frozen=True)
class Kernel:
    """An implementation of FP4 linears.

    Attributes:
        name: what `kernel=` and the report say.
        ops: the op for each format's `base` name.
        prepack: turns a packed weight into the tensors that the op takes for a problem; equal
            where the plan's layout is.
        dtypes: of the activations that it takes.
        backends: of the targets that it runs on; all if empty.
        refuses: says why another problem is not served, or None.
        plan: says how a problem is served.
        int8_ops: for each format an op on the same tensors that rounds activations to 8 bits in
            groups, an approximation; empty where there is none.
        auto_ops: for each format an op on the same tensors that is one of both by the number of
            rows of x, whichever is faster; empty where the exact one always is.
        same_ops: for each format an op on the same tensors that rounds x to the weight's format
            itself; where there is none, x is rounded before.
        settle: finds out for a problem from how many rows on that is so, for those ops.
        merged: for an op, one for several weights of one x: `(x, *lists of packed tensors, list of
            biases) -> list of y`, each to the bit what the op gives; empty where there is none.
        unpack: gives a packed weight back, to the bit, from those tensors, the problem and the
            weight's per-tensor scale; None where it cannot.
        saves_memory: whether what is kept is smaller than the dense weight.
        note: what a user should know of it, for the report.
    """

    name: str
    ops: Mapping[str, OpOverload[..., Tensor]]
    prepack: Callable[[PackedWeight, Problem], tuple[Tensor, ...]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    backends: tuple[str, ...] = ()
    refuses: Callable[[Problem], str | None] = _no_refusal
    plan: Callable[[Problem], Plan] = _as_it_is
    int8_ops: Mapping[str, OpOverload[..., Tensor]] = field(default_factory=dict)
    auto_ops: Mapping[str, OpOverload[..., Tensor]] = field(default_factory=dict)
    same_ops: Mapping[str, OpOverload[..., Tensor]] = field(default_factory=dict)
    settle: Callable[[Problem], None] = _nothing_to_settle
    merged: Mapping[OpOverload[..., Tensor], OpOverload[..., list[Tensor]]] = field(
        default_factory=dict
    )
    unpack: Callable[[Sequence[Tensor], Problem, Tensor | None], PackedWeight] | None = None
    saves_memory: bool = True
    note: str = ""

    def op_for(self, problem: Problem) -> OpOverload[..., Tensor]:
        """Return the op that computes a problem."""
        base = problem.format.base
        if problem.inputs == "int8":
            return self.int8_ops[base]
        if problem.inputs == "auto" and base in self.auto_ops:
            self.settle(problem)
            return self.auto_ops[base]
        return self.same_ops[base] if self.rounds(problem) else self.ops[base]

    def rounds(self, problem: Problem) -> bool:
        """Whether its op rounds activations to the weight's format itself."""
        return problem.inputs == "same" and problem.format.base in self.same_ops

    def serves(self, target: Target) -> bool:
        """Whether it runs on a target at all."""
        return not self.backends or target.backend in self.backends

    def refusal(self, problem: Problem) -> str | None:
        """Say why it does not serve a problem; None if it does."""
        if not self.serves(problem.target):
            where = " and ".join(self.backends)
            return f"it runs on {where}, and the weight is on {problem.target}"
        if problem.format.base not in self.ops and problem.format.base not in self.same_ops:
            return f"it does not read {problem.format}"
        if problem.dtype not in self.dtypes:
            taken = ", ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            return f"activations are {problem.dtype}, and it takes {taken}"
        if problem.inputs == "int8" and problem.format.base not in self.int8_ops:
            return "it does not round activations to 8 bits"
        return self.refuses(problem)
