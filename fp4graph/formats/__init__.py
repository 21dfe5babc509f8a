"""NVFP4, MXFP4 and FP8: what the bits mean."""

from fp4graph.formats.block import (
    FORMATS,
    FP4_FORMATS,
    FP8,
    MXFP4,
    MXFP4_FITTED,
    NVFP4,
    BlockFormat,
    PackedWeight,
    dequantize,
    get_format,
    quantize,
)
from fp4graph.formats.rotation import ROTATIONS, rotate

__all__ = [
    "FORMATS",
    "FP4_FORMATS",
    "FP8",
    "MXFP4",
    "MXFP4_FITTED",
    "NVFP4",
    "ROTATIONS",
    "BlockFormat",
    "PackedWeight",
    "dequantize",
    "get_format",
    "quantize",
    "rotate",
]
