"""How fast the kernels are beside torch's own linears, by the number of rows."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from fp4graph import quantize
from fp4graph.formats import FORMATS, FP4_FORMATS
from fp4graph.gpu_check.device import Call, paired, reason_of
from fp4graph.gpu_check.exact import fused, mode_of, problem_of, rounding
from fp4graph.gpu_check.torch_own import torch_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from fp4graph.gpu_check.device import Device
    from fp4graph.kernels import Kernel

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096))  # Llama 3.1 8B
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 4096)
_ROUNDS = 15


@dataclass(frozen=True)
class Speed:
    """What a way to multiply takes; the fields are the keys of the JSON file.

    Attributes:
        shape: of the weight, NxK.
        rows: of x.
        variant: `F.linear`, a format and a kernel, or what else torch has.
        us: microseconds of a call, the median over rounds.
        quartiles_us: the first and the third.
        gb_per_s: bytes of the weight over `us`, 10^9 a second.
        of_read: share of the bandwidth of a plain read of NVFP4's bytes, measured beside it.
        over_dense: times faster than `F.linear` in the same dtype, in pairs.
        reason: why it was not timed; all numbers are None then.
    """

    shape: str
    rows: int
    variant: str
    us: float | None = None
    quartiles_us: tuple[float, float] | None = None
    gb_per_s: float | None = None
    of_read: float | None = None
    over_dense: float | None = None
    reason: str = ""

    @property
    def is_w4a16(self) -> bool:
        """Whether it is a kernel of fp4graph with the weight in FP4 and x as it is."""
        format, _, kernel = self.variant.partition(" ")
        return format in FP4_FORMATS and not kernel.startswith("W")


def speeds(
    device: Device,
    n: int,
    k: int,
    rows: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    takes: Callable[[Kernel], bool] = lambda kernel: True,
    rounds: int = _ROUNDS,
) -> Iterator[Speed]:
    """Time all ways to multiply, alternating.

    Args:
        device: what to time.
        n: N of the weight.
        k: K.
        rows: of x.
        dtype: of x, and of the dense weight.
        takes: says of a kernel whether it is timed.
        rounds: how many times each way is timed.
    """
    w_NK = torch.randn(n, k, device=device.where) / k**0.5
    x_MK = torch.randn(rows, k, device=device.where).to(dtype)
    asked = [Call("F.linear", lambda w: linear(x_MK, w), (w_NK.to(dtype),))]
    for format in FP4_FORMATS:
        packed = quantize(w_NK, format)
        problem = problem_of(device, n, k, format, dtype)
        for kernel in filter(takes, fused(device, n, k, format, dtype)):
            run = _with_input(kernel.ops[format], x_MK)
            asked.append(Call(f"{format} {kernel.name}", run, kernel.prepack(packed, problem)))
    for format in FORMATS:
        problem = problem_of(device, n, k, format, dtype, "same")
        for kernel in filter(takes, rounding(device, n, k, format, dtype)):
            name = f"{format} {mode_of(problem)} {kernel.name}"
            tensors = kernel.prepack(quantize(w_NK, format), problem)
            asked.append(Call(name, _with_input(kernel.op_for(problem), x_MK), tensors))
    reasons: dict[str, str] = {}
    for name, make in torch_own(device.target, x_MK, n):
        try:
            asked.append(make())
        except Exception as error:  # what this torch has for other devices alone
            reasons[name] = reason_of(error)
    reasons |= {call.name: call.fails() for call in asked}
    able = [call for call in asked if not reasons[call.name]]
    block_size = FP4_FORMATS["nvfp4"].block_size
    read = device.read(n * k // 2 + n * k // block_size)
    *times, roof = device.times([*able, read], rounds)
    for call, seconds in zip(able, times, strict=True):
        first, middle, third = statistics.quantiles(seconds, n=4)
        yield Speed(
            f"{n}x{k}", rows, call.name, middle * 1e6, (first * 1e6, third * 1e6),
            call.nbytes / middle / 1e9,
            paired(roof, seconds) * call.nbytes / read.nbytes,
            paired(times[0], seconds),
        )  # fmt: skip
    for name, reason in reasons.items():
        if reason:
            yield Speed(f"{n}x{k}", rows, name, reason=reason)


def _with_input(op: Callable[..., Tensor], x_MK: Tensor) -> Callable[..., Tensor]:
    return lambda *tensors: op(x_MK, *tensors, None)


def best_over_dense(found: Sequence[Speed]) -> dict[int, float]:
    """Return by number of rows how many times the fastest FP4 kernel is faster than dense.

    It is the median over shapes.
    """
    fastest: dict[tuple[int, str], float] = {}
    for each in found:
        if each.over_dense is not None and each.is_w4a16:
            key = each.rows, each.shape
            fastest[key] = max(each.over_dense, fastest.get(key, 0.0))
    counts = sorted({rows for rows, _ in fastest})
    return {
        count: statistics.median(speed for (rows, _), speed in fastest.items() if rows == count)
        for count in counts
    }
