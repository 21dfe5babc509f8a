"""What a kernel is, which ones there are, and how one is chosen.

A kernel is one `torch.library` op a format, `op(x, *prepack(packed), bias) -> y`, whose meaning is
`F.linear(x, packed.dequantize(x.dtype), bias)` within float rounding. It is chosen once, when a
graph is compiled, for the packed layout hangs on it; what depends on M is the op's own affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fp4graph.errors import OptionError, RefusalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from torch import Tensor
    from torch._ops import OpOverload

    from fp4graph.formats import BlockFormat, PackedWeight


@dataclass(frozen=True)
class Problem:
    """A linear as a kernel sees it; the number of rows of `x` stays open.

    Attributes:
        out_features: N.
        in_features: K.
        format: of the weight.
        dtype: of activations, bias and result.
        device: where all of it lies.
        activations: `int8` if they may be rounded to 8 bits in groups, None if not.
        weight_dtype: of the dense weight, where autocast makes it another; else None.
    """

    out_features: int
    in_features: int
    format: BlockFormat
    dtype: torch.dtype
    device: torch.device
    activations: str | None = None
    weight_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Kernel:
    """Somebody who computes FP4 linears.

    Attributes:
        name: what `kernel=` and the report say.
        ops: the op for each format's `base` name.
        prepack: turns a packed weight into the tensors that the op takes.
        refuses: says why a problem is not served, or None.
        int8_ops: for each format an op on the same tensors that rounds activations to 8 bits in
            groups, an approximation; empty where there is none.
        saves_memory: whether what is kept is smaller than the dense weight.
        note: what a user should know of it, for the report.
    """

    name: str
    ops: Mapping[str, OpOverload[..., Tensor]]
    prepack: Callable[[PackedWeight], tuple[Tensor, ...]]
    refuses: Callable[[Problem], str | None]
    int8_ops: Mapping[str, OpOverload[..., Tensor]] = field(default_factory=dict)
    saves_memory: bool = True
    note: str = ""


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; the one registered last is asked first by `kernel="auto"`."""
    _KERNELS[kernel.name] = kernel
    return kernel


def kernels() -> tuple[Kernel, ...]:
    """Return all kernels in the order in which `auto` asks them."""
    return tuple(reversed(_KERNELS.values()))


def check_name(name: str) -> None:
    """Check a `kernel=` option.

    Raises:
        OptionError: no such kernel.
    """
    if name != "auto" and name not in _KERNELS:
        raise OptionError(f"unknown kernel {name!r}; kernels are auto, {', '.join(_KERNELS)}")


def choose(problem: Problem, prefer: str = "auto") -> Kernel:
    """Choose the kernel for a problem.

    Args:
        problem: the linear.
        prefer: a kernel's name, or `auto` for the first that serves the problem.

    Raises:
        OptionError: no such kernel.
        RefusalError: none serves the problem; the message has each one's reason.
    """
    check_name(prefer)
    asked = [kernel for kernel in kernels() if prefer in ("auto", kernel.name)]
    for kernel in asked:
        if _refusal(kernel, problem) is None:
            return kernel
    raise RefusalError("; ".join(refusals(problem, asked)))


def refusals(problem: Problem, asked: Iterable[Kernel]) -> list[str]:
    """Return why kernels refuse a problem, for those that do."""
    reasons = ((kernel, _refusal(kernel, problem)) for kernel in asked)
    return [f"kernel {kernel.name}: {reason}" for kernel, reason in reasons if reason]


def _refusal(kernel: Kernel, problem: Problem) -> str | None:
    if problem.activations == "int8" and not kernel.int8_ops:
        return "it does not round activations to 8 bits"
    return kernel.refuses(problem)
