"""Would the check see a fault: packed weights are spoilt in small ways, and each must be found.

A kernel whose layout is wrong reads the right numbers at the wrong places. So are the faults here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fp4graph import quantize
from fp4graph.formats import FP4_FORMATS
from fp4graph.formats.minifloat import E2M1
from fp4graph.gpu_check.exact import fused, of_bound, problem_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from fp4graph.gpu_check.device import Device

N, K = 256, 512  # whole tiles of every layout: nothing is padding
ROWS = (1, 16, 64, 257)
_DTYPE = torch.bfloat16
_BYTES = 16  # whose halves are exchanged, where they differ most


@dataclass(frozen=True)
class Fault:
    """What came of a fault; the fields are the keys of the JSON file.

    Attributes:
        kernel: whose packed weight was spoilt.
        format: of the weight.
        rows: of x.
        fault: what was done to it.
        of_bound: the largest error over its bound, as in `Exactness`.
        found: whether that shows the fault.
    """

    kernel: str
    format: str
    rows: int
    fault: str
    of_bound: float

    @property
    def found(self) -> bool:
        """See the class."""
        return self.of_bound > 1


def faults(device: Device, rows: int) -> Iterator[Fault]:
    """Yield what comes of each fault in each tensor that a kernel reads of a packed weight."""
    generator = torch.Generator().manual_seed(rows)
    w_NK = torch.randn(N, K, generator=generator).to(device.where)
    x_MK = torch.randn(rows, K, generator=generator).to(device.where, _DTYPE)
    for format in FP4_FORMATS:
        packed = quantize(w_NK, format)
        for kernel in fused(device, N, K, format, _DTYPE):
            tensors = kernel.prepack(packed, problem_of(device, N, K, format, _DTYPE))
            for number, tensor in enumerate(tensors):
                for name, spoilt in spoil(tensor):
                    wrong = [*tensors[:number], spoilt, *tensors[number + 1 :]]
                    error = of_bound(kernel.ops[format](x_MK, *wrong, None), x_MK, packed, None)
                    yield Fault(kernel.name, format, rows, f"tensor {number}: {name}", error)


def spoil(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield what was done to a packed tensor and a copy to which it was; each differs from it.

    Scales of rows are changed by no power of two, which some layouts divide out again.
    """
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        larger = tensor.clone()
        larger.view(-1)[tensor.numel() // 2] *= 1.5
        yield "one scale half as large again", larger
        return
    words = tensor.reshape(-1).view(torch.int32)
    differ = (words[1:] != words[:-1]).nonzero().view(-1)
    at = int(differ[len(differ) // 2])
    swapped = words.clone()
    swapped[at], swapped[at + 1] = words[at + 1], words[at]
    yield "two neighbouring words exchanged", _like(swapped, tensor)
    yield "moved by a word", _like(words.roll(1), tensor)
    yield "the halves of some bytes exchanged", _halves_exchanged(tensor)


def _halves_exchanged(tensor: Tensor) -> Tensor:
    codes = tensor.reshape(-1).view(torch.uint8).clone()
    low, high = codes & 15, codes >> 4
    values = E2M1.decode(torch.stack((low, high)))
    at = (values[0] - values[1]).abs().topk(_BYTES).indices
    codes[at] = low[at] << 4 | high[at]
    return _like(codes, tensor)


def _like(values: Tensor, tensor: Tensor) -> Tensor:
    return values.view(tensor.dtype).view(tensor.shape)
