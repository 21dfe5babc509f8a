"""Launch Triton kernels on CPU tensors by running their compiled PTX on numpy; see ptx.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kernels.offline import Launch, Launcher
from kernels.ptx import Kernel

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4graph.kernels.target import Target

_GUARD = 256  # bytes around each tensor that read as NaN and that nothing may write


class Emulator:
    """For `run=`: compiles for a target, then runs the PTX.

    Args:
        target: whose code to run.
        edit: changes the PTX first, to see that a fault is caught.
    """

    def __init__(self, target: Target, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
        self._target, self._edit = target, edit
        self._compiled: dict[object, Kernel] = {}

    def __call__(self, kernel: Any) -> Launcher:
        return Launcher(kernel, self._run)

    def _run(self, launch: Launch) -> None:
        """Compile, run, and copy what was written back into the tensors.

        Raises:
            AssertionError: something outside of the tensors was written.
        """
        tensors = list({id(a): a for a in launch.args if isinstance(a, torch.Tensor)}.values())
        places, memory = _lay_out(tensors)
        before = memory.copy()
        numbers = [places[id(a)] if isinstance(a, torch.Tensor) else a for a in launch.args]
        threads = 32 * launch.keywords.get("num_warps", 4)
        self._program(launch).run(launch.grid, threads, numbers, memory)
        for tensor in tensors:
            at = places[id(tensor)]
            tensor.view(torch.uint8).copy_(_bytes(memory[at : at + tensor.nbytes], tensor))
            before[at : at + tensor.nbytes] = memory[at : at + tensor.nbytes]
        assert np.array_equal(before, memory), "memory outside of the tensors was written"

    def _program(self, launch: Launch) -> Kernel:
        kinds = [
            (a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a % 16 == 0
            for a in launch.args
        ]
        key = (launch.kernel, *kinds, *launch.keywords.items())
        if key not in self._compiled:
            ptx = launch.compile(self._target).asm["ptx"]
            self._compiled[key] = Kernel(self._edit(ptx))
        return self._compiled[key]


def _lay_out(tensors: list[torch.Tensor]) -> tuple[dict[int, int], np.ndarray[Any, Any]]:
    places, end = {}, _GUARD
    for tensor in tensors:
        assert tensor.is_contiguous()
        places[id(tensor)] = end
        end += -(-tensor.nbytes // _GUARD) * _GUARD + _GUARD
    memory = np.full(end, 0xFF, np.uint8)
    for tensor in tensors:
        at = places[id(tensor)]
        data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
        memory[at : at + tensor.nbytes] = data
    return places, memory


def _bytes(data: np.ndarray[Any, Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(data.copy()).view(like.view(torch.uint8).shape)
