"""Who computes FP4 linears, and who rounds weights to FP4."""

from fp4graph.kernels.contract import (
    Kernel,
    Plan,
    Problem,
    check_name,
    choose,
    kernels,
    refusals,
    register,
)
from fp4graph.kernels.grouped import grouped
from fp4graph.kernels.reference import FAKE_QUANTIZE, ROTATE, fake_quantize_op
from fp4graph.kernels.target import Target, parse_target, target_of

# Each registers its kernel; `auto` asks the last one first.
from fp4graph.kernels import dequantized  # isort: skip
from fp4graph.kernels import triton  # isort: skip
from fp4graph.kernels import cpu  # isort: skip
from fp4graph.kernels.quantize import check_quantizer, is_plain, quantize

__all__ = [
    "FAKE_QUANTIZE",
    "ROTATE",
    "Kernel",
    "Plan",
    "Problem",
    "Target",
    "check_name",
    "check_quantizer",
    "choose",
    "cpu",
    "dequantized",
    "fake_quantize_op",
    "grouped",
    "is_plain",
    "kernels",
    "parse_target",
    "quantize",
    "refusals",
    "register",
    "target_of",
    "triton",
]
