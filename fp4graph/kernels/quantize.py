"""Rounding weights to nearest: the native way where there is one, the reference elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.calibrate import CALIBRATED, DATA_FREE, check_format
from fp4graph.errors import OptionError
from fp4graph.formats import BlockFormat, get_format
from fp4graph.kernels.cpu import library, ops

if TYPE_CHECKING:
    from torch import Tensor

    from fp4graph.formats import PackedWeight

QUANTIZERS = ("rtn", *DATA_FREE)
_NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def quantize(
    weight: Tensor, format: str | BlockFormat = "nvfp4", quantizer: str = "rtn"
) -> PackedWeight:
    """Round a weight to FP4.

    `rtn` rounds to nearest, bit for bit as `BlockFormat.quantize`, many times faster on a CPU. It
    never compiles the native library: what is not built yet is not worth half a minute here.

    Args:
        weight: [N, K], see `BlockFormat.quantize`.
        format: a format or its name.
        quantizer: how codes are found: `rtn`; `four-over-six`, for NVFP4; `scale-search`.

    Raises:
        WeightError: not a matrix, not a float, or holds NaN or Inf.
        OptionError: no such format or quantizer, or one that the format has no use for.
    """
    block_format = get_format(format)
    check_quantizer(quantizer, block_format)
    if quantizer != "rtn":
        return DATA_FREE[quantizer](weight, block_format)
    served = is_plain(weight) and weight.device.type == "cpu" and weight.dtype in _NATIVE
    if served and weight.ndim == 2 and weight.numel() and library.find() and library.native():
        return ops.quantize(weight, block_format)
    return block_format.quantize(weight)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor and no subclass that computes in its own way."""
    return type(weight).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def check_quantizer(name: str, format: BlockFormat) -> None:
    """Check a `quantizer=` option.

    Raises:
        OptionError: no such quantizer, or not for this format.
    """
    if name in CALIBRATED:
        raise OptionError(
            f"quantizer {name!r} needs data: give the file that `fp4graph calibrate` or "
            "fp4graph.calibrate() made, calibration=FILE"
        )
    if name not in QUANTIZERS:
        raise OptionError(f"unknown quantizer {name!r}; quantizers are {', '.join(QUANTIZERS)}")
    check_format(name, format)
