"""Implementations of FP4 linears."""

from fp4graph.kernels.contract import Kernel, Plan, Problem
from fp4graph.kernels.grouped import grouped
from fp4graph.kernels.reference import FAKE_QUANTIZE, ROTATE, before
from fp4graph.kernels.registry import KERNELS, check_name, choose, refusals
from fp4graph.kernels.target import Target, parse_target, target_of

__all__ = [
    "FAKE_QUANTIZE",
    "KERNELS",
    "ROTATE",
    "Kernel",
    "Plan",
    "Problem",
    "Target",
    "before",
    "check_name",
    "choose",
    "grouped",
    "parse_target",
    "refusals",
    "target_of",
]
