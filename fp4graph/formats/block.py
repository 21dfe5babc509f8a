"""The formats: what their bits mean, and rounding to nearest into them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4graph.errors import OptionError, WeightError
from fp4graph.formats.minifloat import E2M1, E4M3, Minifloat
from fp4graph.formats.scales import ChannelScale, E4M3Scale, E8M0Scale, FittedScale

if TYPE_CHECKING:
    from fp4graph.formats.scales import ScaleCodec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class BlockFormat:
    """A small float format: values that share a scale in groups along K.

    Attributes:
        base: `nvfp4`, `mxfp4`, `fp8` or `mxfp4-fitted`; fixes the stored bits and how they are
            read.
        block_size: values in a group; 0 for a whole row.
        scale_codec: how the scale of a group is chosen, stored and read.
        values: what a code means.
    """

    base: str
    block_size: int
    scale_codec: ScaleCodec
    values: Minifloat = E2M1

    @property
    def name(self) -> str:
        """`mxfp4`, or `mxfp4:even` where the scale rule is not the format's default."""
        if self in (FORMATS.get(self.base), MXFP4_FITTED):
            return self.base
        return f"{self.base}:{self.scale_codec.rule}"

    @property
    def has_per_tensor_scale(self) -> bool:
        """Whether float32 numbers of the whole tensor stand above the block scales."""
        return self.scale_codec.per_tensor_bytes > 0

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return self.values.sign_shift + 1

    def group_size(self, in_features: int) -> int:
        """Return how many values share a scale in a row of so many."""
        return self.block_size or max(in_features, 1)

    def shapes(self, out_features: int, in_features: int) -> tuple[tuple[int, int], ...]:
        """Return the shapes of `qdata` and `scale` of a packed weight, padding included."""
        size = self.group_size(in_features)
        groups = -(-in_features // size)
        return (out_features, groups * size * self.bits // 8), (out_features, groups)

    def packed_bytes(self, out_features: int, in_features: int) -> int:
        """Return the size of a packed weight, padding and scales included."""
        qdata, scale = map(math.prod, self.shapes(out_features, in_features))
        return qdata + scale * self.scale_codec.dtype.itemsize + self.scale_codec.per_tensor_bytes

    def quantize(self, weight: Tensor) -> PackedWeight:
        """Round a weight to nearest, ties to even codes.

        Args:
            weight: [N, K] float32, bfloat16, float16 or float64. K is padded with zeros to a
                multiple of `block_size`. float64 is rounded to float32 first.

        Raises:
            WeightError: not a matrix, not a float, or holds NaN or Inf.
        """
        w_NGB, amax_NG = self.groups(weight)
        scale, per_tensor_scale = self.scale_codec.encode(amax_NG)
        return self.pack(w_NGB, scale, per_tensor_scale, (weight.shape[0], weight.shape[1]))

    def groups(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return a weight's groups, float32 [N, G, B], and their largest magnitudes, [N, G].

        Raises:
            WeightError: see `quantize`.
        """
        if weight.ndim != 2 or weight.dtype not in _FLOATS:
            problem = f"expected a float matrix, got {weight.dtype} of shape {tuple(weight.shape)}"
            raise WeightError(problem)
        w_NGB = self._groups(weight.detach())
        amax_NG = w_NGB.abs().amax(-1)
        if not bool(amax_NG.isfinite().all()):
            raise WeightError(_nonfinite(weight))
        return w_NGB, amax_NG

    def pack(
        self,
        w_NGB: Tensor,
        scale: Tensor,
        per_tensor_scale: Tensor | None,
        shape: tuple[int, int],
    ) -> PackedWeight:
        """Round groups to nearest under given scales, codes uint8 [N, G]."""
        codes = self._round(w_NGB, scale, per_tensor_scale).flatten(1)
        return self.pack_codes(codes, scale, per_tensor_scale, shape)

    def pack_codes(
        self,
        codes: Tensor,
        scale: Tensor,
        per_tensor_scale: Tensor | None,
        shape: tuple[int, int],
    ) -> PackedWeight:
        """Put codes, uint8 [N, K rounded up to whole groups], under given scales."""
        return PackedWeight(
            qdata=codes if self.bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4),
            scale=scale.view(self.scale_codec.dtype),
            per_tensor_scale=per_tensor_scale,
            shape=shape,
            format=self,
        )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantise and dequantise activations, groups along the last dimension.

        Args:
            x: [..., K], any float dtype. NVFP4's per-tensor scale is taken from all of `x`, at
                each call, as torchao does for dynamic activations.

        Returns:
            the same shape and dtype; a group that holds NaN or Inf is all NaN, and the tensor
            scale is that of the other groups. Finite values never become Inf: where a scale rule
            rounds beyond the dtype's range, they become its largest.
        """
        rows = math.prod(x.shape[:-1])
        x_RGB = self._groups(x.reshape(rows, x.shape[-1]))
        codes, scale, per_tensor_scale, finite_RG = self._rounded(x_RGB)
        factor_RG = self.scale_codec.decode(scale, per_tensor_scale)
        factor_RG = torch.where(finite_RG, factor_RG, torch.nan)
        y_RK = (self.values.decode(codes) * factor_RG[..., None]).flatten(1)[:, : x.shape[-1]]
        return _saturated(y_RK, x.dtype).reshape(x.shape).contiguous()

    def quantize_rows(self, x_RK: Tensor) -> PackedWeight:
        """Round activations as `quantize` does weights; a group with NaN or Inf gets a NaN scale.

        Args:
            x_RK: [rows, K], any float dtype; of NVFP4, FP8 and MXFP4.
        """
        assert self.scale_codec.nan is not None
        codes, scale, per_tensor_scale, finite_RG = self._rounded(self._groups(x_RK))
        scale, shape = scale.where(finite_RG, self.scale_codec.nan), (len(x_RK), x_RK.shape[1])
        return self.pack_codes(codes.flatten(1), scale, per_tensor_scale, shape)

    def _rounded(self, x_RGB: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return codes and scales of groups, and which hold neither NaN nor Inf."""
        amax_RG = x_RGB.abs().amax(-1)
        finite_RG = amax_RG.isfinite()
        scale, per_tensor_scale = self.scale_codec.encode(amax_RG.where(finite_RG, 0))
        return self._round(x_RGB, scale, per_tensor_scale), scale, per_tensor_scale, finite_RG

    def _groups(self, x_RK: Tensor) -> Tensor:
        x_RK = x_RK.to(torch.float32)
        size = self.group_size(x_RK.shape[1])
        x_RK = pad(x_RK, (0, -x_RK.shape[1] % size))
        x_RGB: Tensor = x_RK.unflatten(1, (x_RK.shape[1] // size, size))
        return x_RGB

    def _round(self, x_RGB: Tensor, scale: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        factor_RG = self.scale_codec.reciprocal(scale, per_tensor_scale)
        return self.values.encode(x_RGB * factor_RG[..., None])


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight in FP4 or FP8.

    Invariants, with Kp = K rounded up to a multiple of the block size B:

    - `qdata` is uint8 [N, Kp/2], the even column in the low nibble; of FP8 [N, K], E4M3.
    - `scale` is [N, Kp/B] in the format's scale dtype; of FP8 float32 [N, 1].
    - `per_tensor_scale` is a 0-dim float32 tensor for NVFP4, else None. In the study's
      `mxfp4-fitted` it is what `FittedScale` says.
    - weight ~ value(qdata) * scale * per_tensor_scale. Columns from K on are padding.
    """

    qdata: Tensor
    scale: Tensor
    per_tensor_scale: Tensor | None
    shape: tuple[int, int]
    format: BlockFormat

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.qdata, self.scale, self.per_tensor_scale)
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def scale_codes(self) -> Tensor:
        """The scales as their codec reads them: uint8, or float32 for FP8; [N, groups]."""
        return self.scale if self.scale.dtype == torch.float32 else self.scale.view(torch.uint8)

    @property
    def codes(self) -> Tensor:
        """The code of each value, uint8 [N, Kp]."""
        if self.format.bits == 8:
            return self.qdata
        return torch.stack((self.qdata & 0xF, self.qdata >> 4), dim=-1).flatten(1)

    def to(self, device: torch.device) -> PackedWeight:
        """Return it on another device."""
        top = self.per_tensor_scale
        return replace(
            self,
            qdata=self.qdata.to(device),
            scale=self.scale.to(device),
            per_tensor_scale=None if top is None else top.to(device),
        )

    def rows(self, index: Tensor) -> PackedWeight:
        """Return some rows, int64."""
        return replace(
            self,
            qdata=self.qdata[index],
            scale=self.scale[index],
            shape=(len(index), self.shape[1]),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight's values, [N, K] in `dtype`: the meaning of every kernel.

        Computed in float32 as code's value * (per_tensor_scale * block scale), then rounded once to
        `dtype`; in a 16-bit one, what lies beyond its range becomes its largest value. A NaN scale
        gives a group of NaN.
        """
        size = self.format.group_size(self.shape[1])
        values = self.format.values.decode(self.codes).reshape(*self.scale.shape, size)
        factor = self.format.scale_codec.decode(self.scale_codes, self.per_tensor_scale)
        w_NK = (values * factor[..., None]).flatten(1)[:, : self.shape[1]]
        return w_NK.to(dtype) if dtype.itemsize >= w_NK.dtype.itemsize else _saturated(w_NK, dtype)


NVFP4 = BlockFormat("nvfp4", 16, E4M3Scale())
MXFP4 = BlockFormat("mxfp4", 32, E8M0Scale())
FP8 = BlockFormat("fp8", 0, ChannelScale(), E4M3)
"""E4M3 with a scale an output channel, as engines deploy it: `float-quantized`, FP8 per channel."""
FP4_FORMATS = {"nvfp4": NVFP4, "mxfp4": MXFP4}
FORMATS = {**FP4_FORMATS, "fp8": FP8}
MXFP4_FITTED = BlockFormat("mxfp4-fitted", 32, FittedScale())
"""MXFP4 with scales that no hardware reads, for studies: the dagger of 2509.23202 appendix H."""


def get_format(name: str | BlockFormat) -> BlockFormat:
    """Return a format by name: `nvfp4`, `mxfp4`, `mxfp4:RULE`, `fp8`, or `mxfp4-fitted`.

    Raises:
        OptionError: no such format or rule; the message names those that exist.
    """
    if isinstance(name, BlockFormat):
        return name
    if name in FORMATS:
        return FORMATS[name]
    if name == MXFP4_FITTED.base:
        return MXFP4_FITTED
    base, _, rule = name.partition(":")
    if base == "mxfp4" and rule in E8M0Scale.rules:
        return replace(MXFP4, scale_codec=E8M0Scale(rule))
    known = [*FORMATS, *(f"mxfp4:{rule}" for rule in E8M0Scale.rules), MXFP4_FITTED.base]
    raise OptionError(f"unknown format {name!r}; formats are {', '.join(known)}")


def quantize(weight: Tensor, format: str | BlockFormat = "nvfp4") -> PackedWeight:
    """Round a weight; see `BlockFormat.quantize`."""
    return get_format(format).quantize(weight)


def dequantize(packed: PackedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values of a packed weight; see `PackedWeight.dequantize`."""
    return packed.dequantize(dtype)


def _saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp(-largest, largest).to(dtype)


def _nonfinite(weight: Tensor) -> str:
    count = int((~weight.isfinite()).sum())
    if count:
        return f"{count} of {weight.numel()} values are NaN or Inf"
    count = int((~weight.to(torch.float32).isfinite()).sum())
    return f"{count} of {weight.numel()} values are beyond the range of float32, which scales have"
