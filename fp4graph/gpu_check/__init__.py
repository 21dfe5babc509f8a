"""Are the kernels right on a GPU, how fast are they there, how is their work best cut."""

from fp4graph.gpu_check.check import check

__all__ = ["check"]
