"""NVIDIA's tensor cores fed from weights that lie in memory as their registers want them."""

from fp4graph.kernels.triton.mma.ops import FRAGMENTS

__all__ = ["FRAGMENTS"]
