"""Triton kernels for GPUs: portable ones, which are the meaning of the faster ones."""

from fp4graph.kernels.triton.ops import TRITON

__all__ = ["TRITON"]
