"""The reference kernel: dequantise, then `F.linear`. It is the meaning of all the others.

Bytes moved a call: the packed weight once, plus the dense weight written and read again, so it is
slower than a dense linear; it exists to be right, on every device.

Registered by `Library.define` and `impl` rather than `torch.library.custom_op`: about 3 us a call
instead of 15 (measured, 1x64x64).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fp4graph.formats import (
    FORMATS,
    FP4_FORMATS,
    MXFP4_FITTED,
    BlockFormat,
    PackedWeight,
    get_format,
    rotate,
)
from fp4graph.kernels.contract import Kernel, Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Op = torch._ops.OpOverload[..., Tensor]

_LIBRARY = torch.library.Library("fp4graph", "FRAGMENT")
READ = {**FORMATS, MXFP4_FITTED.base: MXFP4_FITTED}
"""What `dequantize` reads, by base name."""


def define(kernel: str, format: BlockFormat, body: Callable[..., Tensor]) -> Op:
    """Register `fp4graph::<kernel>_<format>(x, qdata, scale, [per_tensor_scale,] bias)`."""
    name = f"{kernel}_{format.base.replace('-', '_')}"
    scales = (
        "Tensor scale, Tensor per_tensor_scale" if format.has_per_tensor_scale else "Tensor scale"
    )
    _LIBRARY.define(f"{name}(Tensor x, Tensor qdata, {scales}, Tensor? bias) -> Tensor")

    def fake(x: Tensor, qdata: Tensor, *_: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:-1], qdata.shape[0]))

    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fp4graph::{name}", fake, lib=_LIBRARY)
    op: Op = getattr(torch.ops.fp4graph, name).default
    return op


def packed_weight(
    format: BlockFormat,
    in_features: int,
    qdata: Tensor,
    scale: Tensor,
    per_tensor_scale: Tensor | None = None,
) -> PackedWeight:
    """Put together again what `prepack` took apart."""
    scale = scale.view(format.scale_codec.dtype)
    return PackedWeight(qdata, scale, per_tensor_scale, (qdata.shape[0], in_features), format)


def _meaning(format: BlockFormat) -> Callable[..., Tensor]:
    def meaning(x: Tensor, qdata: Tensor, *rest: Tensor) -> Tensor:
        *scales, bias = rest
        packed = packed_weight(format, x.shape[-1], qdata, *scales)
        return linear(x, packed.dequantize(x.dtype), bias)

    return meaning


def _prepack(packed: PackedWeight, _: Problem) -> tuple[Tensor, ...]:
    scale = packed.scale.view(torch.uint8)  # float8 scales are strangers to many compilers
    if packed.per_tensor_scale is None:
        return packed.qdata, scale
    return packed.qdata, scale, packed.per_tensor_scale


def _unpack(
    tensors: Sequence[Tensor], problem: Problem, per_tensor_scale: Tensor | None
) -> PackedWeight:
    qdata, scale = tensors[:2]
    return packed_weight(problem.format, problem.in_features, qdata, scale, per_tensor_scale)


def _fake_quantize(x: Tensor, format: str, rotation: int = 0) -> Tensor:
    return get_format(format).fake_quantize(rotate(x, rotation) if rotation else x)


for _name in ("fake_quantize", "fake_quantize_reference"):
    _LIBRARY.define(f"{_name}(Tensor x, str format, int rotation=0) -> Tensor")
    _LIBRARY.impl(_name, _fake_quantize, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"fp4graph::{_name}", lambda x, format, rotation=0: x.new_empty(x.shape), lib=_LIBRARY
    )

FAKE_QUANTIZE: Op = torch.ops.fp4graph.fake_quantize.default
"""`fake_quantize(x, format name, rotation=0) -> y`: the activation half of W4A4.

See `BlockFormat`; `x` is rotated before, if `rotation` is a block and not 0.
"""


def fake_quantize_op(format: BlockFormat) -> Op:
    """Return `FAKE_QUANTIZE`, or its reference for a format that native code does not know."""
    if format.base in FP4_FORMATS:
        return FAKE_QUANTIZE
    op: Op = torch.ops.fp4graph.fake_quantize_reference.default
    return op


_LIBRARY.define("rotate(Tensor x, int block) -> Tensor")
_LIBRARY.impl("rotate", rotate, "CompositeExplicitAutograd")
torch.library.register_fake("fp4graph::rotate", lambda x, block: x.new_empty(x.shape), lib=_LIBRARY)

ROTATE: Op = torch.ops.fp4graph.rotate.default
"""`rotate(x, block) -> y`: what goes with a rotated weight; see `fp4graph.formats.rotate`."""


def before(kernel: Kernel, problem: Problem, rotation: int) -> tuple[Any, ...] | None:
    """Return what an input goes through before a kernel's op: (op, arguments after x), or None."""
    format = problem.format
    if problem.inputs == "same" and not kernel.rounds(problem):
        return fake_quantize_op(format), format.name, rotation
    return (ROTATE, rotation) if rotation else None


REFERENCE = Kernel(
    name="reference",
    ops={base: define("reference", format, _meaning(format)) for base, format in READ.items()},
    prepack=_prepack,
    unpack=_unpack,
    note="dequantised at each call, which is slower than dense",
)
