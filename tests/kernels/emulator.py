"""Launch Triton kernels on CPU tensors by running their compiled PTX on numpy; see ptx.py."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from kernels.offline import Launch, Launcher
from kernels.ptx import Kernel
from kernels.ptx_warps import Descriptor, WarpKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4graph.kernels.target import Target

    Array = np.ndarray[Any, Any]

_GUARD = 1024  # bytes around each tensor that read as NaN and that nothing may write


class Emulator:
    """For `run=`: compiles for a target, then runs the PTX.

    Args:
        target: whose code to run.
        edit: changes the PTX first, to see that a fault is caught.
        late: what of a warp-specialised kernel happens as late as it may; see `WarpKernel`.
        seed: of the order of its warps.
    """

    def __init__(
        self,
        target: Target,
        edit: Callable[[str], str] = lambda ptx: ptx,
        late: tuple[str, ...] = (),
        seed: int = 0,
    ) -> None:
        self._target, self._edit, self._late, self._seed = target, edit, late, seed
        self._compiled: dict[object, tuple[Kernel, int]] = {}

    def __call__(self, kernel: Any) -> Launcher:
        return Launcher(kernel, self._run)

    def _run(self, launch: Launch) -> None:
        """Compile, run, and copy what was written back into the tensors.

        Raises:
            AssertionError: something outside of the tensors was written.
        """
        spans = _spans([_tensor_of(each) for each in launch.args])
        memory = np.full(sum(len(data) + 2 * _GUARD for _, data in spans) + _GUARD, 0xFF, np.uint8)
        places, end = [], _GUARD
        for first, data in spans:
            places.append((first, end))
            memory[end : end + len(data)] = data
            end += -(-len(data) // _GUARD) * _GUARD + _GUARD
        before = memory.copy()
        kernel, threads = self._program(launch)
        numbers: list[int] = []
        for each in launch.args:
            numbers += _numbers(each, places, kernel)
        kernel.run(launch.grid, threads, numbers, memory)
        for (_, data), (_, at) in zip(spans, places, strict=True):
            data[:] = before[at : at + len(data)] = memory[at : at + len(data)]
        assert np.array_equal(before, memory), "memory outside of the tensors was written"

    def _program(self, launch: Launch) -> tuple[Kernel, int]:
        key = (launch.kernel, *map(_kind, launch.args), *launch.keywords.items())
        if key not in self._compiled:
            compiled = launch.compile(self._target)
            ptx = self._edit(compiled.asm["ptx"])
            by_warps = "wgmma" in ptx
            kernel = WarpKernel(ptx, self._late, self._seed) if by_warps else Kernel(ptx)
            self._compiled[key] = kernel, 32 * compiled.metadata.num_warps
        return self._compiled[key]


def _tensor_of(argument: Any) -> torch.Tensor | None:
    if isinstance(argument, TensorDescriptor):
        return argument.base
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous()
        return argument
    return None


def _kind(argument: Any) -> object:
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape), repr(argument.layout)
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return argument % 16 == 0


def _spans(tensors: list[torch.Tensor | None]) -> list[tuple[int, Array]]:
    """Return (address, bytes) of what the tensors of each storage take together."""
    found: dict[int, tuple[int, int]] = {}
    for tensor in tensors:
        if tensor is not None:
            storage = tensor.untyped_storage().data_ptr()
            first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
            known = found.get(storage, (first, end))
            found[storage] = min(known[0], first), max(known[1], end)
    return [
        (first, np.ctypeslib.as_array((ctypes.c_uint8 * (end - first)).from_address(first)))
        for first, end in found.values()
    ]


def _numbers(argument: Any, places: list[tuple[int, int]], kernel: Kernel) -> list[int]:
    """Return what a kernel gets for an argument: a number, an address, or a descriptor's parts."""
    tensor = _tensor_of(argument)
    if tensor is None:
        return [argument]
    first, at = max(each for each in places if each[0] <= tensor.data_ptr())
    at += tensor.data_ptr() - first
    if not isinstance(argument, TensorDescriptor):
        return [at]
    assert isinstance(kernel, WarpKernel)
    size = tensor.element_size()
    kernel.descriptors[at] = Descriptor(
        at, tuple(argument.shape), tuple(size * each for each in argument.strides),
        tuple(argument.block_shape), size, argument.layout.swizzle_byte_width == 128,
    )  # fmt: skip
    return [at, *argument.shape, *argument.strides]
