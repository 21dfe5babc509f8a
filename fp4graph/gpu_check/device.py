"""What the check asks of a device: a GPU, or what stands in for one in tests."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from fp4graph.kernels import Target


@dataclass(frozen=True)
class Call:
    """One way to compute something.

    Attributes:
        name: what it is.
        run: takes `tensors`, or copies of them.
        tensors: what it reads of the weight.
    """

    name: str
    run: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def __call__(self) -> Any:
        """Run once."""
        return self.run(*self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return sum(each.nbytes for each in self.tensors)

    def fails(self) -> str:
        """Run once and return the error in one line; empty where there is none."""
        try:
            self()
        except Exception as error:  # compilers and drivers raise anything
            return reason_of(error)
        return ""


def reason_of(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Device(Protocol):
    """What is checked.

    Attributes:
        where: where tensors go.
        target: as kernels see it.
    """

    where: torch.device
    target: Target

    def facts(self) -> dict[str, Any]:
        """Return what it is and what runs on it, as JSON takes it; nothing that names a user."""

    def read(self, nbytes: int) -> Call:
        """Return a plain read of that many bytes: the roof of whatever reads a weight once."""

    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Return the seconds of each call, by round: calls alternate, and weights are cold."""


def paired(base: Sequence[float], other: Sequence[float]) -> float:
    """Return how many times faster `other` is: the median of ratios taken in pairs."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))
