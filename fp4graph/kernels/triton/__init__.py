"""Triton kernels for GPUs: portable ones, and faster ones for NVIDIA, which mean the same."""

from fp4graph.kernels.triton.mma import FRAGMENTS
from fp4graph.kernels.triton.ops import TRITON

__all__ = ["FRAGMENTS", "TRITON"]
