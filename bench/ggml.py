"""ggml's MXFP4 on the CPU, by the library that llama-cpp-python brings.

Its weights as ggml stores them; it rounds activations to 8 bits in groups of 32.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

_F32, _MXFP4 = 0, 39
_SLACK = 64 << 20  # for ggml's own structures


class _Parameters(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_POINTER, _SIZE, _LONG, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {
    "ggml_init": (_POINTER, [_Parameters]),
    "ggml_free": (None, [_POINTER]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, _INT, _LONG, _LONG]),
    "ggml_get_data": (_POINTER, [_POINTER]),
    "ggml_nbytes": (_SIZE, [_POINTER]),
    "ggml_quantize_chunk": (
        _SIZE, [_INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER],
    ),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph": (_POINTER, [_POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_graph_compute_with_ctx": (_INT, [_POINTER, _POINTER, _INT]),
}  # fmt: skip


def library() -> object | None:
    """Return ggml's functions, or None where llama-cpp-python is not installed."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    folder = Path(found.origin).parent / "lib"
    names = {}
    for name in ("libggml-base.so", "libggml-cpu.so"):
        loaded = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
        for function, (result, arguments) in _SIGNATURES.items():
            if hasattr(loaded, function):
                bound = getattr(loaded, function)
                bound.restype, bound.argtypes = result, arguments
                names[function] = bound
    return type("Ggml", (), {name: staticmethod(f) for name, f in names.items()})


class Linears:
    """Copies of one weight, and a graph that multiplies x with each in turn.

    Args:
        ggml: the library.
        w: float32 [N, K].
        rows: M of x.
        copies: of the weight.
        threads: to compute with.
    """

    def __init__(self, ggml: object, w: Tensor, rows: int, copies: int, threads: int) -> None:
        self._ggml, self._threads = ggml, threads
        N, K = w.shape
        per_copy = N * K * 17 // 32 + rows * N * 4
        size = copies * per_copy + rows * K * 8 + 2 * N * 4 + _SLACK
        self._context = ggml.ggml_init(_Parameters(size, None, False))
        self._x = ggml.ggml_new_tensor_2d(self._context, _F32, K, rows)
        self._graph = ggml.ggml_new_graph(self._context)
        for _ in range(copies):
            weight = ggml.ggml_new_tensor_2d(self._context, _MXFP4, K, N)
            data = ggml.ggml_get_data(weight)
            ggml.ggml_quantize_chunk(_MXFP4, w.data_ptr(), data, 0, N, K, None)
            self._y = ggml.ggml_mul_mat(self._context, weight, self._x)
            ggml.ggml_build_forward_expand(self._graph, self._y)
        self.weight_bytes = ggml.ggml_nbytes(weight)
        self._shape = (rows, N)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply float32 x [M, K] with every copy; return a view of the last result."""
        ctypes.memmove(self._ggml.ggml_get_data(self._x), x.data_ptr(), x.nbytes)
        status = self._ggml.ggml_graph_compute_with_ctx(self._context, self._graph, self._threads)
        assert status == 0, status
        count = self._shape[0] * self._shape[1]
        floats = (ctypes.c_float * count).from_address(self._ggml.ggml_get_data(self._y))
        return torch.frombuffer(floats, dtype=torch.float32).view(self._shape)

    def __del__(self) -> None:
        self._ggml.ggml_free(self._context)
