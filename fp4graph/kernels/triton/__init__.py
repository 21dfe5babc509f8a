"""Triton kernels for GPUs: portable ones, and faster ones for NVIDIA, which mean the same."""

# Each registers its kernel; `auto` asks the last one first.
from fp4graph.kernels.triton.ops import TRITON  # isort: skip
from fp4graph.kernels.triton.fragments import FRAGMENTS  # isort: skip

__all__ = ["FRAGMENTS", "TRITON"]
