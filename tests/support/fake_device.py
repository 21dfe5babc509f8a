"""A device for the GPU check: this CPU, whose own kernels run, with times by a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp4graph.gpu_check.device import Call
from fp4graph.kernels import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class FakeDevice:
    """What `fp4graph.gpu_check` asks of a GPU.

    Args:
        seconds: what a call takes, by its name.
        target: what it passes for.
    """

    def __init__(
        self, seconds: Callable[[str], float] = lambda _: 1e-3, target: str = "cpu"
    ) -> None:
        self.where = torch.device("cpu")
        backend, _, arch = target.partition(":")
        self.target = Target(backend, arch, 132)
        self._seconds = seconds
        self.timed: list[list[str]] = []

    def facts(self) -> dict[str, Any]:
        return {"gpu": "a fake", "target": str(self.target)}

    def read(self, nbytes: int) -> Call:
        return Call("plain read", torch.sum, (torch.zeros(nbytes, dtype=torch.uint8),))

    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Return times that drift alike for all, as a GPU that grows hot would."""
        self.timed.append([call.name for call in calls])
        drift = [1 + number / 10 for number in range(rounds)]
        return [[self._seconds(call.name) * each for each in drift] for call in calls]
