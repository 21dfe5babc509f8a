"""How packed weights lie on disk in the layouts of other programs, tensor by tensor.

| | compressed-tensors | ModelOpt |
|---|---|---|
| codes, uint8 [N, K/2], the even column in the low nibble | `weight_packed` | `weight` |
| block scales, float8_e4m3fn [N, K/16] or uint8 [N, K/32] | `weight_scale` | `weight_scale` |
| of the whole, float32, NVFP4 | `weight_global_scale` [1], divisor | `weight_scale_2` [], factor |
| of inputs, float32, NVFP4 | `input_global_scale` [1], a divisor | `input_scale` [], a factor |
| FP8 codes, float8_e4m3fn [N, K] | `weight` | `weight` |
| FP8 scales, a channel or one for all | `weight_scale` [N, 1] or [1] | `weight_scale` [N] or [] |

Source: compressed-tensors 0.20, `compressors/nvfp4` and `compressors/mxfp4`; ModelOpt 0.47,
`torch/export/quant_utils.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4graph.errors import ModelError
from fp4graph.formats import FP8, MXFP4, NVFP4, PackedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fp4graph.formats import BlockFormat

_FP8_QDATA = "weight"
LARGEST = 6.0 * 448.0
"""The largest magnitude over the per-tensor scale: E2M1's largest value times E4M3's."""


@dataclass(frozen=True)
class Layout:
    """Names of a linear's tensors, behind its path and a dot.

    Attributes:
        name: what commands call it.
        qdata: of the codes.
        scale: of the block scales.
        per_tensor_scale: of the scale of the whole.
        input_scale: of the inputs' scale.
        divides: whether those two are divisors, [1], and not factors, [].
    """

    name: str
    qdata: str
    scale: str
    per_tensor_scale: str
    input_scale: str
    divides: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of a weight's own tensors."""
        return self.qdata, self.scale, self.per_tensor_scale

    def write(self, packed: PackedWeight, largest_input: float | None = None) -> dict[str, Tensor]:
        """Return the tensors of a weight.

        Args:
            packed: the weight.
            largest_input: largest magnitude of its inputs, where they are quantised with NVFP4.
        """
        scale = packed.scale.contiguous()
        if packed.format == FP8:
            scale = scale if self.divides else scale.reshape(-1)
            return {_FP8_QDATA: packed.qdata.view(torch.float8_e4m3fn), self.scale: scale}
        if packed.per_tensor_scale is None:
            scale = scale.view(torch.uint8)
        found = {self.qdata: packed.qdata.contiguous(), self.scale: scale}
        if packed.per_tensor_scale is not None:
            found[self.per_tensor_scale] = self._top(packed.per_tensor_scale)
            if largest_input is not None:
                top = torch.tensor(largest_input / LARGEST, dtype=torch.float32, device="cpu")
                found[self.input_scale] = self._top(top)
        return found

    def _top(self, factor: Tensor) -> Tensor:
        return factor.reciprocal().reshape(1) if self.divides else factor.clone()

    def read(self, tensors: Mapping[str, Tensor], where: str) -> PackedWeight:
        """Return the weight that tensors hold.

        Raises:
            ModelError: one is missing, or has another dtype or shape; names it.
        """
        if _is_fp8(tensors.get(_FP8_QDATA)):
            return _fp8(tensors[_FP8_QDATA], tensors.get(self.scale), f"{where}.{self.scale}")
        qdata = _checked(tensors, self.qdata, torch.uint8, 2, where)
        scale = tensors.get(self.scale)
        if scale is not None and scale.dtype == FP8.scale_codec.dtype:  # fp4graph's own
            return _fp8(qdata.view(torch.float8_e4m3fn), scale, f"{where}.{self.scale}")
        if scale is not None and scale.dtype == MXFP4.scale_codec.dtype:
            scale = scale.view(torch.uint8)
        if scale is None or scale.dtype not in (torch.uint8, torch.float8_e4m3fn):
            kind = "missing" if scale is None else str(scale.dtype)
            raise ModelError(f"{where}.{self.scale} is {kind}: expected float8_e4m3fn or uint8")
        format: BlockFormat = MXFP4 if scale.dtype == torch.uint8 else NVFP4
        rows, columns = qdata.shape[0], qdata.shape[1] * 2
        if tuple(scale.shape) != (rows, columns // format.block_size):
            expected = [rows, columns // format.block_size]
            raise ModelError(f"{where}.{self.scale} is {list(scale.shape)}: expected {expected}")
        top = None
        if format.has_per_tensor_scale:
            given = _checked(tensors, self.per_tensor_scale, torch.float32, None, where)
            if given.numel() != 1:
                raise ModelError(f"{where}.{self.per_tensor_scale} has {given.numel()} values")
            top = given.reshape(()).clone()
            top = top.reciprocal() if self.divides else top
            if not bool(top.isfinite()) or float(top) <= 0:
                raise ModelError(f"{where}.{self.per_tensor_scale} is {float(given):g}")
            if bool(scale.float().isnan().any()):
                raise ModelError(f"{where}.{self.scale} holds NaN")
        scale = scale.view(format.scale_codec.dtype)
        return PackedWeight(qdata, scale, top, (rows, columns), format)


def _is_fp8(codes: Tensor | None) -> bool:
    return codes is not None and codes.dtype == torch.float8_e4m3fn


def _fp8(codes: Tensor, scale: Tensor | None, where: str) -> PackedWeight:
    """Return an FP8 weight; one scale of the whole becomes one a row, which is the same."""
    rows = codes.shape[0]
    if scale is None or not scale.is_floating_point() or scale.numel() not in (1, rows):
        given = "missing" if scale is None else f"{scale.dtype} {list(scale.shape)}"
        raise ModelError(f"{where} is {given}: expected a factor a row of {rows}, or one of all")
    factor = scale.float().reshape(-1, 1).expand(rows, 1).contiguous()
    if not bool((factor.isfinite() & (factor > 0)).all()):
        raise ModelError(f"{where} holds what is no factor above zero")
    qdata = codes.view(torch.uint8)
    if bool(((qdata & 0x7F) == 0x7F).any()):
        raise ModelError(f"{where}: its codes hold NaN")
    return PackedWeight(qdata, factor, None, (rows, codes.shape[1]), FP8)


def _checked(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int | None, where: str
) -> Tensor:
    found = tensors.get(name)
    if found is None:
        raise ModelError(f"{where}.{name} is missing")
    if found.dtype != dtype or (dims is not None and found.ndim != dims):
        kind = f"{found.dtype} {list(found.shape)}"
        raise ModelError(f"{where}.{name} is {kind}: expected {dtype}")
    return found


COMPRESSED_TENSORS = Layout(
    "compressed-tensors", "weight_packed", "weight_scale", "weight_global_scale",
    "input_global_scale", divides=True,
)  # fmt: skip
MODELOPT = Layout(
    "modelopt", "weight", "weight_scale", "weight_scale_2", "input_scale", divides=False
)
OWN = Layout("fp4graph", "qdata", "scale", "per_tensor_scale", "", divides=False)
LAYOUTS = {each.name: each for each in (COMPRESSED_TENSORS, MODELOPT)}
