"""The native CPU kernels as ops: schemas and shapes here, bodies in native/ops.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4graph.errors import RefusalError, WeightError
from fp4graph.formats import FORMATS, FP4_FORMATS, FP8, BlockFormat, PackedWeight
from fp4graph.kernels.contract import Kernel, Plan, Problem
from fp4graph.kernels.cpu.crossings import ROUNDED, crossings, describe, settle
from fp4graph.kernels.cpu.library import FORMAT_CODES, Missing, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    Op = torch._ops.OpOverload[..., Tensor]
    MergedOp = torch._ops.OpOverload[..., list[Tensor]]

_LIBRARY = torch.library.Library("fp4graph", "FRAGMENT")
_EXCESS = 256.0  # kE4M3Excess in native/layout.h
_RULES = {"nearest": 0, "floor": 0, "ceil": 1, "rceil": 2, "even": 3}

for _schema in (
    "cpu_pack_tiles(Tensor qdata, Tensor scale, Tensor per_tensor_scale, int format)"
    " -> (Tensor, Tensor)",
    "cpu_unpack_tiles(Tensor tiles, int N, int format) -> (Tensor, Tensor)",
    "cpu_pack_fp8(Tensor qdata, Tensor scale) -> (Tensor, Tensor, Tensor)",
    "cpu_unpack_fp8(Tensor tiles, int N, int K) -> Tensor",
    "cpu_quantize(Tensor w, int format, int rule) -> (Tensor, Tensor, Tensor, Tensor)",
    "cpu_attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
):
    _LIBRARY.define(_schema)


def pack_tiles(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Lay a packed weight out for the native kernels, as native/layout.h describes.

    Returns:
        `tiles`, uint8 [ceil(N / 16), bytes of a panel], and `row_scale`, float32 [N].

    Raises:
        RefusalError: there is no native library.
        WeightError: codes of FP8 are NaN.
    """
    found = load()
    if isinstance(found, Missing):
        raise RefusalError(f"no native CPU kernels: {found.reason}")
    if packed.format == FP8:
        tiles, row_scale, finite = torch.ops.fp4graph.cpu_pack_fp8(packed.qdata, packed.scale)
        if not bool(finite):
            raise WeightError("codes of an FP8 weight are NaN")
        return tiles, row_scale
    tensor = packed.per_tensor_scale
    tiles, row_scale = torch.ops.fp4graph.cpu_pack_tiles(
        packed.qdata,
        packed.scale.view(torch.uint8),
        torch.ones((), dtype=torch.float32, device="cpu") if tensor is None else tensor,
        FORMAT_CODES[packed.format.base],
    )
    return tiles, row_scale


def unpack_tiles(
    tiles: Tensor, shape: tuple[int, int], format: BlockFormat
) -> tuple[Tensor, Tensor]:
    """Return (`qdata`, `scale` as uint8) of a weight [N, K] in tiles: `pack_tiles` undone."""
    qdata, scale = torch.ops.fp4graph.cpu_unpack_tiles(tiles, shape[0], FORMAT_CODES[format.base])
    return qdata, scale


def quantize(weight: Tensor, format: BlockFormat) -> PackedWeight:
    """Round a matrix to nearest with the library, which must be loaded.

    Raises:
        WeightError: see `BlockFormat.quantize`.
    """
    rule = _RULES[format.scale_codec.rule]
    qdata, scale, per_tensor_scale, broken = torch.ops.fp4graph.cpu_quantize(
        weight.detach(), FORMAT_CODES[format.base], rule
    )
    if int(broken):
        return format.quantize(weight)  # which says what is wrong
    return PackedWeight(
        qdata=qdata,
        scale=scale.view(format.scale_codec.dtype),
        per_tensor_scale=per_tensor_scale if format.has_per_tensor_scale else None,
        shape=(weight.shape[0], weight.shape[1]),
        format=format,
    )


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    B, H, M, D = q.shape
    return q.new_empty(B, M, H, D)


torch.library.register_fake("fp4graph::cpu_attend", _attended, lib=_LIBRARY)


def _define(name: str) -> Op:
    _LIBRARY.define(f"{name}(Tensor x, Tensor tiles, Tensor row_scale, Tensor? bias) -> Tensor")

    def fake(x: Tensor, tiles: Tensor, row_scale: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty((*x.shape[:-1], row_scale.shape[0]))

    torch.library.register_fake(f"fp4graph::{name}", fake, lib=_LIBRARY)
    op: Op = getattr(torch.ops.fp4graph, name).default
    return op


def _define_merged(name: str) -> MergedOp:
    lists = "Tensor[] tiles, Tensor[] row_scale, Tensor?[] bias"
    _LIBRARY.define(f"{name}(Tensor x, {lists}) -> Tensor[]")

    def fake(
        x: Tensor, tiles: list[Tensor], row_scale: list[Tensor], bias: list[Tensor | None]
    ) -> list[Tensor]:
        return [x.new_empty((*x.shape[:-1], each.shape[0])) for each in row_scale]

    torch.library.register_fake(f"fp4graph::{name}", fake, lib=_LIBRARY)
    op: MergedOp = getattr(torch.ops.fp4graph, name).default
    return op


def _refuses(problem: Problem) -> str | None:
    if problem.inputs != "int8" and problem.autocast_refusal:
        return problem.autocast_refusal
    found = load()
    return found.reason if isinstance(found, Missing) else None


def _unpack(
    tensors: Sequence[Tensor], problem: Problem, per_tensor_scale: Tensor | None
) -> PackedWeight:
    shape, format = (problem.out_features, problem.in_features), problem.format
    if format == FP8:
        qdata = torch.ops.fp4graph.cpu_unpack_fp8(tensors[0], *shape)
        return PackedWeight(qdata, (tensors[1] / _EXCESS)[:, None], None, shape, format)
    qdata, scale = unpack_tiles(tensors[0], shape, format)
    scale = scale.view(format.scale_codec.dtype)
    return PackedWeight(qdata, scale, per_tensor_scale, shape, format)


def _plan(problem: Problem) -> Plan:
    padded = (-(-problem.out_features // 16) * 16, problem.in_features)
    tile = "panels, which many rows share once decoded"
    if problem.inputs == "auto":
        tile += f"; activations {describe(_crossings(problem))}"
    return Plan("panels of 16 rows", tile, padded)


def _settle(problem: Problem) -> None:
    if problem.dtype in ROUNDED:
        settle(problem.format, problem.dtype, _crossings(problem))


def _crossings(problem: Problem) -> tuple[int, ...]:
    base = problem.format.base
    if problem.inputs != "auto" or base not in _INT8_OPS:
        return ()
    return crossings(problem.format, problem.dtype, _OPS[base], _INT8_OPS[base], pack_tiles)


_OPS = {base: _define(f"cpu_{base}") for base in FORMATS}
_INT8_OPS = {base: _define(f"cpu_int8_{base}") for base in FP4_FORMATS}
_AUTO_OPS = {base: _define(f"cpu_auto_{base}") for base in FP4_FORMATS}

CPU = Kernel(
    name="cpu",
    ops=_OPS,
    int8_ops=_INT8_OPS,
    auto_ops=_AUTO_OPS,
    settle=_settle,
    merged={
        **{op: _define_merged(f"cpu_merged_{base}") for base, op in _OPS.items()},
        **{op: _define_merged(f"cpu_merged_int8_{base}") for base, op in _INT8_OPS.items()},
        **{op: _define_merged(f"cpu_merged_auto_{base}") for base, op in _AUTO_OPS.items()},
    },
    prepack=lambda packed, _: pack_tiles(packed),
    unpack=_unpack,
    backends=("cpu",),
    refuses=_refuses,
    plan=_plan,
)
