"""Which kernels there are, and how one is chosen.

A kernel is chosen once, when a graph is compiled, because the choice fixes the packed layout.
Choices that depend on M are made inside the op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fp4graph.errors import OptionError, RefusalError
from fp4graph.kernels.cpu import CPU
from fp4graph.kernels.dequantized import DEQUANTIZED
from fp4graph.kernels.reference import REFERENCE
from fp4graph.kernels.scaled_mm import SCALED_MM
from fp4graph.kernels.triton import FRAGMENTS, TRITON

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp4graph.kernels.contract import Kernel, Problem

KERNELS: tuple[Kernel, ...] = (CPU, SCALED_MM, FRAGMENTS, TRITON, DEQUANTIZED, REFERENCE)
"""All kernels; `kernel="auto"` takes the first that serves the problem."""


def check_name(name: str) -> None:
    """Check a `kernel=` option.

    Raises:
        OptionError: no such kernel.
    """
    names = ("auto", *(kernel.name for kernel in KERNELS))
    if name not in names:
        raise OptionError(f"unknown kernel {name!r}; kernels are {', '.join(names)}")


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
    asked = [kernel for kernel in KERNELS if prefer in ("auto", kernel.name)]
    for kernel in asked:
        if kernel.refusal(problem) is None:
            return kernel
    raise RefusalError("; ".join(refusals(problem, asked)))


def refusals(problem: Problem, asked: Iterable[Kernel]) -> list[str]:
    """Return why kernels refuse a problem, for those that do."""
    reasons = ((kernel, kernel.refusal(problem)) for kernel in asked)
    return [f"kernel {kernel.name}: {reason}" for kernel, reason in reasons if reason]
