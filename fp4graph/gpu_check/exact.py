"""Are the kernels right on this device: against float64, on shapes of models and odd ones."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from fp4graph import Activations, PackedWeight, quantize
from fp4graph.formats import FORMATS, FP4_FORMATS
from fp4graph.kernels import KERNELS, Kernel, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fp4graph.gpu_check.device import Device
    from fp4graph.kernels.contract import Inputs

_SHAPES = (
    *((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),  # Llama 3.1 8B
    *((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),  # Qwen2.5 7B
    *((896, 896), (128, 896), (4864, 896), (896, 4864)),  # Qwen2.5 0.5B
    *((576, 576), (192, 576), (1536, 576), (576, 1536)),  # SmolLM2 135M
    *((100, 300), (1, 64), (17, 48), (65, 1008)),  # odd
)
_ROWS = (1, 16, 33, 128, 5, 64, 257, 8, 100, 17, 129)
_TWICE = [each for each in _SHAPES for _ in range(2)]
PROBLEMS = tuple((n, k, rows) for (n, k), rows in zip(_TWICE, itertools.cycle(_ROWS), strict=False))
"""(N, K, rows of x), forty of them, two of each weight."""

_ROUNDINGS = 6.0  # deviations of one rounding of each product


@dataclass(frozen=True)
class Exactness:
    """What came of one problem; the fields are the keys of the JSON file.

    Attributes:
        shape: of the weight, NxK.
        rows: of x.
        format: of the weight; W4A4 and W8A8 where x is rounded to it as well.
        dtype: of x and of the result.
        kernel: its name.
        of_bound: the largest error of an element over what rounding explains.
        repeats: whether a second call gave the same bits.
        ok: whether both are as they should be.
    """

    shape: str
    rows: int
    format: str
    dtype: str
    kernel: str
    of_bound: float
    repeats: bool

    @property
    def ok(self) -> bool:
        """See the class."""
        return self.of_bound <= 1 and self.repeats


def fused(device: Device, n: int, k: int, format: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the kernels of a device that serve a problem, but for those that dequantise."""
    problem = problem_of(device, n, k, format, dtype)
    for kernel in KERNELS:
        if kernel.backends and kernel.saves_memory and kernel.refusal(problem) is None:
            yield kernel


def rounding(device: Device, n: int, k: int, format: str, dtype: torch.dtype) -> Iterator[Kernel]:
    """Yield the kernels of a device that round x to the weight's format themselves."""
    problem = problem_of(device, n, k, format, dtype, "same")
    for kernel in KERNELS:
        if kernel.rounds(problem) and kernel.refusal(problem) is None:
            yield kernel


def problem_of(
    device: Device, n: int, k: int, format: str, dtype: torch.dtype, inputs: Inputs = "exact"
) -> Problem:
    """Return a linear as kernels see it."""
    return Problem(n, k, FORMATS[format], dtype, device.target, inputs)


def exactness(device: Device, n: int, k: int, rows: int, dtype: torch.dtype) -> Iterator[Exactness]:
    """Yield what comes of a problem, for each format and kernel."""
    generator = torch.Generator().manual_seed(n + k + rows)
    w_NK = torch.randn(n, k, generator=generator).to(device.where) / k**0.5
    x_MK = torch.randn(rows, k, generator=generator).to(device.where, dtype)
    bias_N = torch.randn(n, generator=generator).to(device.where, dtype)
    for format in FORMATS:
        packed = quantize(w_NK, format)
        exact = fused(device, n, k, format, dtype) if format in FP4_FORMATS else ()
        asked: list[tuple[Kernel, Inputs]] = [(kernel, "exact") for kernel in exact]
        asked += [(kernel, "same") for kernel in rounding(device, n, k, format, dtype)]
        for kernel, inputs in asked:
            problem = problem_of(device, n, k, format, dtype, inputs)
            op, tensors = kernel.op_for(problem), kernel.prepack(packed, problem)
            y_MN = op(x_MK, *tensors, bias_N)
            rounds = inputs == "same"
            taken_MK = problem.format.fake_quantize(x_MK.float()) if rounds else x_MK
            yield Exactness(
                f"{n}x{k}", rows, f"{format} {mode_of(problem)}" if rounds else format,
                str(dtype).removeprefix("torch."), kernel.name,
                of_bound(y_MN, taken_MK, packed, bias_N),
                torch.equal(y_MN, op(x_MK, *tensors, bias_N)),
            )  # fmt: skip


def mode_of(problem: Problem) -> str:
    """Return `W4A4`, or `W8A8`."""
    return Activations.SAME.mode(problem.format.bits)


def of_bound(y_MN: Tensor, x_MK: Tensor, packed: PackedWeight, bias_N: Tensor | None) -> float:
    """Return the largest error of an element over its bound; infinite where y is not finite.

    The bound is half a unit of the result, and six deviations of what comes of rounding each
    product once to the dtype of x. Sums in float32 stay far below it, and so does a weight that is
    rounded to that dtype; a weight that stands elsewhere does not.
    """
    x, w = x_MK.double(), packed.dequantize(torch.float64)
    exact = linear(x, w, None if bias_N is None else bias_N.double())
    half_unit = torch.finfo(y_MN.dtype).eps / 2
    spread = linear(x.square(), w.square()).sqrt()
    bound = half_unit * (1.01 * exact.abs() + _ROUNDINGS * spread)
    bound += torch.finfo(y_MN.dtype).tiny
    return float(((y_MN.double() - exact).abs() / bound).nan_to_num(nan=float("inf")).max())
