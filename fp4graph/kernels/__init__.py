"""Who computes FP4 linears."""

from fp4graph.kernels.contract import Kernel, Problem, check_name, choose, kernels, register
from fp4graph.kernels.reference import FAKE_QUANTIZE

__all__ = [
    "FAKE_QUANTIZE",
    "Kernel",
    "Problem",
    "check_name",
    "choose",
    "kernels",
    "register",
]
