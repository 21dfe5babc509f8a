"""Run a `@triton.jit` kernel on CPU tensors, in a process that compiles it as well.

    interpret(kernel)[grid](*tensors, BLOCK=64)

Triton's own interpreter is switched on for a whole process (TRITON_INTERPRET=1), patches the
language for nested functions without putting it back, and in 3.7.1 computes wrongly in bfloat16 and
float8: products and dots of bfloat16 work on the bit patterns, casts truncate, subnormals are lost.
Here it runs one kernel at a time, repaired, and everything is put back afterwards.
test_triton_interpreter.py notices when a new Triton needs other repairs, or none.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Array = np.ndarray[Any, Any]
Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder

_TORCH = {
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_AS_BITS = (tl.bfloat16, tl.float8e4nv, tl.float8e5)  # kept as integers of the same width
_NOT_ARGUMENTS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_LANGUAGE = (tl, tl.core, tl.math, tl.tensor, tl.core.dtype, tl.core.tensor_descriptor_base)

_twins: dict[Any, JITFunction[Any]] = {}
_interpreted: dict[Any, Any] = {}


class interpret:
    """A kernel that runs in the interpreter; see the module."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **options: Any) -> None:
            for name in _NOT_ARGUMENTS:
                options.pop(name, None)
            with _repaired(), np.errstate(all="ignore"):  # GPUs do not warn
                interpreter.InterpretedFunction(self._kernel.fn)[grid](*args, **options)

        return run


def twin(function: Any, reference: JITFunction[Any]) -> None:
    """Have the interpreter run `reference` for a device function of inline assembly."""
    _twins[function.fn] = reference


@contextlib.contextmanager
def _repaired() -> Iterator[None]:
    patched: list[tuple[Any, dict[str, Any]]] = [
        (each, dict(vars(each)))
        for each in (*_LANGUAGE, Builder, JITFunction, type(interpreter.interpreter_semantic))
    ]
    JITFunction.__call__ = _call_device_function  # type: ignore[method-assign]
    for name, repair in _REPAIRS.items():
        setattr(Builder, name, repair)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        try:
            yield
        finally:
            for owner, before in patched:
                _put_back(owner, before)


def _put_back(owner: Any, before: dict[str, Any]) -> None:
    for name in list(vars(owner)):
        if name not in before:
            delattr(owner, name)
    for name, value in before.items():
        if vars(owner).get(name) is not value:
            setattr(owner, name, value)


def _call_device_function(function: Any, *args: Any, **options: Any) -> Any:
    body = _twins.get(function.fn, function).fn
    if body not in _interpreted:
        _interpreted[body] = interpreter.InterpretedFunction(body)
    return _interpreted[body](*args, **options)


def _value(data: Array, dtype: Any) -> torch.Tensor:
    """Return what the interpreter's storage of a dtype means."""
    tensor = torch.from_numpy(np.ascontiguousarray(data))
    return tensor.view(_TORCH[dtype]) if dtype in _AS_BITS else tensor


def _storage(value: torch.Tensor, dtype: Any, shape: tuple[int, ...]) -> Array:
    value = value.to(_TORCH[dtype]).contiguous()
    if dtype in _AS_BITS:
        value = value.view({1: torch.uint8, 2: torch.int16}[value.element_size()])
    return value.numpy().view(interpreter._get_np_dtype(dtype)).reshape(shape)


def _float32(handle: Any) -> Array:
    dtype = handle.dtype.scalar
    return _value(handle.data, dtype).float().numpy() if dtype in _AS_BITS else handle.data


def _rounded(values: Array, dtype: Any) -> Any:
    if values.dtype == bool:
        return Handle(values, tl.int1)
    exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return Handle(_storage(exact, dtype, values.shape), dtype)


def _elementwise(name: str, operands: int) -> Callable[..., Any]:
    stock = getattr(Builder, name)

    def repair(self: Any, *args: Any) -> Any:
        handles, op = args[:operands], args[operands]
        dtype = handles[-1].dtype.scalar
        if dtype not in _AS_BITS or op is np.where:
            return stock(self, *args)
        return _rounded(op(*map(_float32, handles)), dtype)

    return repair


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    dtype = z.dtype.scalar
    if dtype not in _AS_BITS:
        return _stock_fma(self, x, y, z)
    return _rounded(_float32(x) * _float32(y) + _float32(z), dtype)


def _dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
    product = np.matmul(_float32(a).astype(np.float32), _float32(b).astype(np.float32))
    return Handle(product.astype(acc.data.dtype) + acc.data, acc.dtype.scalar)


def _cast(self: Any, source: Any, target: Any) -> Any:
    before, after = source.dtype.scalar, target.scalar
    if before in _TORCH and after in _TORCH:
        value = _value(source.data, before)
        if after == tl.float8e4nv:  # saturates, as the instruction does
            value = value.float().clamp(-448, 448)
        return Handle(_storage(value, after, source.data.shape), after)
    if before in _AS_BITS:
        return Handle(_float32(source).astype(interpreter._get_np_dtype(target)), after)
    if after in _AS_BITS:
        return _rounded(source.data.astype(np.float32), after)
    return _stock_cast(self, source, target)


def _bfloat16(self: Any, value: float) -> Any:
    return _rounded(np.array([value], dtype=np.float32), tl.bfloat16)


def _fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    return _cast(self, source, target)


_stock_fma, _stock_cast = Builder.create_fma, Builder.cast_impl
_REPAIRS: dict[str, Callable[..., Any]] = {
    "unary_op": _elementwise("unary_op", 1),
    "binary_op": _elementwise("binary_op", 2),
    "ternary_op": _elementwise("ternary_op", 3),
    "create_fma": _fma,
    "create_dot": _dot,
    "create_fp_to_fp": _fp_to_fp,
    "get_bf16": _bfloat16,
    **dict.fromkeys(
        ("cast_impl", "create_fp_trunc", "create_fp_ext", "create_si_to_fp", "create_ui_to_fp",
         "create_fp_to_si", "create_fp_to_ui"),
        _cast,
    ),
}  # fmt: skip
