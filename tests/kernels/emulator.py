"""Launch Triton kernels on CPU tensors by running their compiled PTX on numpy; see ptx.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kernels.offline import compile_launch
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

    def __call__(self, kernel: Any) -> _Launcher:
        return _Launcher(self, kernel)

    def run(self, kernel: Any, grid: tuple[int, ...], args: Any, keywords: dict[str, Any]) -> None:
        """Compile, run, and copy what was written back into the tensors.

        Raises:
            AssertionError: something outside of the tensors was written.
        """
        program = self._program(kernel, args, keywords)
        tensors = list({id(a): a for a in args if isinstance(a, torch.Tensor)}.values())
        places, memory = _lay_out(tensors)
        before = memory.copy()
        numbers = [places[id(a)] if isinstance(a, torch.Tensor) else a for a in args]
        program.run(grid, 32 * keywords["num_warps"], numbers, memory)
        for tensor in tensors:
            at = places[id(tensor)]
            tensor.view(torch.uint8).copy_(_bytes(memory[at : at + tensor.nbytes], tensor))
            before[at : at + tensor.nbytes] = memory[at : at + tensor.nbytes]
        assert np.array_equal(before, memory), "memory outside of the tensors was written"

    def _program(self, kernel: Any, args: Any, keywords: dict[str, Any]) -> Kernel:
        kinds = [
            (a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a % 16 == 0
            for a in args
        ]
        key = (kernel, *kinds, *keywords.items())
        if key not in self._compiled:
            compiled = compile_launch(kernel, args, keywords, self._target)
            self._compiled[key] = Kernel(self._edit(compiled.asm["ptx"]))
        return self._compiled[key]


class _Launcher:
    def __init__(self, emulator: Emulator, kernel: Any) -> None:
        self._emulator, self._kernel = emulator, kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **keywords: Any) -> None:
            options = {"num_warps": 4} | keywords
            self._emulator.run(self._kernel, grid, args, options)

        return launch


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
