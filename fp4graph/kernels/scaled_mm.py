"""W4A4 and W8A8 on tensor cores of few bits: torch's `scaled_mm`, which multiplies codes by codes.

The op rounds x itself, once for all linears of one input where they are merged. NVFP4's block
scales lie as the hardware reads them: tiles of 128 rows by 4 groups, 512 bytes each, row r and
group g at 16 (r % 32) + 4 (r / 32) + g. Products are summed in float32, so a result differs from
`fake_quantize` and `F.linear` by rounding alone. **It has not run on a GPU.**
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import pad

from fp4graph.formats import FP8, NVFP4, BlockFormat, PackedWeight
from fp4graph.kernels.contract import Kernel, Plan, Problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    Op = torch._ops.OpOverload[..., Tensor]
    MergedOp = torch._ops.OpOverload[..., list[Tensor]]
    Side = tuple[Tensor, ...]

_LIBRARY = torch.library.Library("fp4graph", "FRAGMENT")
_SINCE = {"nvfp4": 100, "fp8": 89}
_MULTIPLE = {"nvfp4": 32, "fp8": 16}  # what torch wants N and K to be multiples of
_TENSORS = {"nvfp4": ("qdata", "scale", "per_tensor_scale"), "fp8": ("qdata", "scale")}


def rounded(x_MK: Tensor, format: BlockFormat) -> Side:
    """Round activations to one side of a product.

    Args:
        x_MK: [M, K] bfloat16, M > 0.
        format: NVFP4, or FP8.

    Returns:
        NVFP4: qdata uint8 [M, K/2], scale uint8 in tiles, per_tensor_scale float32 [1], of all x.
        FP8: qdata uint8 [M, K], scale float32 [M, 1]. A group that holds NaN or Inf has scale NaN.
    """
    if x_MK.is_cuda:
        from fp4graph.kernels.triton import rounding

        with torch.cuda.device_of(x_MK):
            return rounding.fp8(x_MK) if format == FP8 else rounding.nvfp4(x_MK)
    packed = format.quantize_rows(x_MK)
    return (packed.qdata, packed.scale) if format == FP8 else _nvfp4_side(packed)


def tiled(scale: Tensor) -> Tensor:
    """Return block scales, uint8 [rows, groups], in tiles of 128 by 4, filled up with zeros."""
    rows, groups = scale.shape
    filled = pad(scale, (0, -groups % 4, 0, -rows % 128))
    tiles = filled.view(-1, 4, 32, filled.shape[1] // 4, 4)  # r / 32, r % 32, tile, g
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def untiled(tiles: Tensor, rows: int, groups: int) -> Tensor:
    """Undo `tiled`."""
    across = -(-groups // 4)
    filled = tiles.view(-1, across, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return filled.reshape(-1, across * 4)[:rows, :groups].contiguous()


def _nvfp4_side(packed: PackedWeight) -> Side:
    assert packed.per_tensor_scale is not None
    scale = tiled(packed.scale_codes & 0x7F)  # the sign bit is ignored
    return packed.qdata, scale, packed.per_tensor_scale.view(1)


def _prepack(packed: PackedWeight, _: Problem) -> tuple[Tensor, ...]:
    return (packed.qdata, packed.scale.T) if packed.format == FP8 else _nvfp4_side(packed)


def _unpack(
    tensors: Sequence[Tensor], problem: Problem, per_tensor_scale: Tensor | None
) -> PackedWeight:
    qdata, scale = tensors[:2]
    shape, format = (problem.out_features, problem.in_features), problem.format
    if format == FP8:
        return PackedWeight(qdata, scale.T, None, shape, format)
    codes = untiled(scale, *format.shapes(*shape)[1]).view(format.scale_codec.dtype)
    return PackedWeight(qdata, codes, per_tensor_scale, shape, format)


def _multiply(
    format: BlockFormat, x: Tensor, weights: Sequence[Side], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """Round x once and multiply it by each weight."""
    x_MK = x.reshape(-1, x.shape[-1])
    if not len(x_MK):
        return [x.new_empty((*x.shape[:-1], len(weight[0]))) for weight in weights]
    x_MK = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    side = rounded(x_MK, format)
    found = [
        _product(format, side, w, bias, x.dtype) for w, bias in zip(weights, biases, strict=True)
    ]
    return [y_MN.unflatten(0, x.shape[:-1]) for y_MN in found]


def _product(
    format: BlockFormat, x: Side, w: Side, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    kind, order = functional.ScalingType, functional.SwizzleType
    if format == FP8:
        codes, kinds, orders = torch.float8_e4m3fn, [kind.RowWise], None
    else:
        codes, kinds = torch.float4_e2m1fn_x2, [kind.BlockWise1x16, kind.TensorWise]
        orders = [order.SWIZZLE_32_4_4, order.NO_SWIZZLE]
    return functional.scaled_mm(
        x[0].view(codes), w[0].view(codes).t(),
        _scales(format, x), kinds, _scales(format, w), kinds,
        orders, orders, bias, dtype,
    )  # fmt: skip


def _scales(format: BlockFormat, side: Side) -> list[Tensor]:
    """Return a side's scales as torch takes them."""
    if format == FP8:
        return [side[1]]
    return [side[1].view(format.scale_codec.dtype), side[2]]


def _define(format: BlockFormat) -> tuple[Op, MergedOp]:
    """Register the op of a format, and that of several weights of one x."""
    base, names = format.base, _TENSORS[format.base]
    one, many = f"scaled_mm_{base}", f"scaled_mm_merged_{base}"
    single = ", ".join(f"Tensor {name}" for name in names)
    _LIBRARY.define(f"{one}(Tensor x, {single}, Tensor? bias) -> Tensor")
    lists = ", ".join(f"Tensor[] {name}" for name in names)
    _LIBRARY.define(f"{many}(Tensor x, {lists}, Tensor?[] bias) -> Tensor[]")

    def run(x: Tensor, *rest: Any) -> Tensor:
        return _multiply(format, x, [rest[:-1]], [rest[-1]])[0]

    def run_many(x: Tensor, *rest: Any) -> list[Tensor]:
        return _multiply(format, x, list(zip(*rest[:-1], strict=True)), rest[-1])

    def fake(x: Tensor, qdata: Tensor, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], qdata.shape[0]))

    def fake_many(x: Tensor, qdata: list[Tensor], *_: Any) -> list[Tensor]:
        return [fake(x, each) for each in qdata]

    for name, body, shapes in ((one, run, fake), (many, run_many, fake_many)):
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fp4graph::{name}", shapes, lib=_LIBRARY)
    ops = torch.ops.fp4graph
    return getattr(ops, one).default, getattr(ops, many).default


def _refuses(problem: Problem) -> str | None:
    if problem.inputs != "same":
        return "it multiplies codes by codes, as activations='same' asks for"
    base, target = problem.format.base, problem.target
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'fp4graph[triton]'"
    if target.capability < _SINCE[base]:
        return f"tensor cores take {base} from sm_{_SINCE[base]} on, and this is {target.arch}"
    multiple = _MULTIPLE[base]
    shape = problem.out_features, problem.in_features
    if any(size % multiple for size in shape):
        return f"torch wants N and K to be multiples of {multiple}, and they are {shape}"
    if problem.experts > 1:
        return "experts round the rows of all of them together"
    return problem.autocast_refusal


_OPS = {format.base: _define(format) for format in (NVFP4, FP8)}

SCALED_MM = Kernel(
    name="scaled_mm",
    ops={},
    same_ops={base: one for base, (one, _) in _OPS.items()},
    merged=dict(_OPS.values()),
    prepack=_prepack,
    unpack=_unpack,
    dtypes=(torch.bfloat16,),
    backends=("cuda",),
    refuses=_refuses,
    plan=lambda _: Plan("qdata as it is, scales as tensor cores read them", "torch's choice"),
)
