"""Rounding weights to nearest: the native way where there is one, the reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.errors import OptionError, WeightError
from fp4graph.formats import FP4_FORMATS, BlockFormat, get_format
from fp4graph.kernels.cpu import library, ops
from fp4graph.kernels.reference import ROTATE
from fp4graph.quantizers.quantizer import GRIDS, Quantizer

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import PackedWeight

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    weight: Tensor, format: str | BlockFormat = "nvfp4", quantizer: str | Quantizer = "rtn"
) -> PackedWeight:
    """Round a weight to FP4 or FP8.

    `rtn` rounds to nearest, bit for bit as `BlockFormat.quantize`, many times faster on a CPU. It
    never compiles the native library: what is not built yet is not worth a minute here.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: a format or its name.
        quantizer: how codes are found: `rtn`; `scale-search`; for NVFP4 `four-over-six`,
            `alternating-search`, `grid-search`; with `@16`, `@32`, `@64` or `@128` of the weight
            rotated, whose inputs must be rotated too.

    Raises:
        WeightError: not a matrix, not a float, or holds NaN or Inf; or K is no multiple of the
            rotation.
        OptionError: no such format or quantizer, or one that the format has no use for.
    """
    block_format = get_format(format)
    found = check_quantizer(quantizer, block_format)
    if found.rotation:
        if weight.ndim == 2 and weight.shape[1] % found.rotation:
            problem = f"K={weight.shape[1]} is no multiple of the rotation's {found.rotation}"
            raise WeightError(problem)
        weight = ROTATE(weight.detach().to(torch.float32), found.rotation)
    if found.grid != "rtn":
        return GRIDS[found.grid](weight, block_format, None)
    served = is_plain(weight) and weight.device.type == "cpu" and weight.dtype in _NATIVE
    served = served and block_format.base in FP4_FORMATS
    if served and weight.ndim == 2 and weight.numel() and library.find() and library.native():
        return ops.quantize(weight, block_format)
    return block_format.quantize(weight)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor and no subclass that computes in its own way."""
    return type(weight).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def check_quantizer(name: str | Quantizer, format: BlockFormat) -> Quantizer:
    """Read a `quantizer=` option that is to do without data.

    Raises:
        OptionError: no such quantizer, not for this format, or one that needs data.
    """
    found = Quantizer.parse(name, format)
    if found.needs_data:
        raise OptionError(
            f"quantizer {str(name)!r} needs data: give the file that `fp4graph calibrate` or "
            "fp4graph.calibrate() made, calibration=FILE"
        )
    return found
