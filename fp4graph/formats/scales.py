"""Block scales: how a group's largest magnitude becomes a stored scale, and back.

Sources: NVFP4, arXiv 2509.25149 appendix B; MXFP4, OCP Microscaling Formats 1.0, section 6.3, for
the rule `floor`; torchao's ScaleCalculationMode for `ceil`, `rceil` and `even`; arXiv 2509.23202
appendix H for the fitted scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from fp4graph.formats.minifloat import (
    E2M1,
    E4M3,
    ceil_exponent,
    decode_e8m0,
    even_exponent,
    floor_exponent,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_E2M1_MAX_EXPONENT = 2
_E8M0_BIAS = 127

# Below this the reciprocal of a block scale would overflow float32; such a tensor is all but zero.
_SMALLEST_PER_TENSOR_SCALE = 2.0**-110


class ScaleCodec(Protocol):
    """Encodes and decodes the scales of all groups of one tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of a block scale: one byte, or float32, which is its own code."""

    @property
    def per_tensor_bytes(self) -> int:
        """Size of what stands above the block scales, once a tensor; 0 for nothing."""

    @property
    def nan(self) -> float | None:
        """Code of a scale that is NaN; None where every code is a number."""

    @property
    def rule(self) -> str:
        """Name of the rule that picks a scale."""

    def encode(self, amax: Tensor, largest_scale: float = E4M3.max) -> tuple[Tensor, Tensor | None]:
        """Turn the largest magnitude of each group into (codes, per_tensor_scale or None).

        Args:
            amax: float32, finite.
            largest_scale: what the largest block scale becomes, where there is a tensor's scale.
        """

    def decode(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """Return the float32 factor of each group."""

    def reciprocal(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """Return the float32 factor that values are multiplied by before they are rounded."""


@dataclass(frozen=True)
class E4M3Scale:
    """NVFP4: E4M3 scale a group, rounded to nearest even, and one float32 scale a tensor.

    `per_tensor_scale` = amax / (6 * 448), so that the largest block scale is 448. Block scales are
    clamped to E4M3's smallest subnormal, 2^-9, so that no group is lost to a scale of zero
    (torchao clamps to 2^-6 and loses resolution in groups below amax / 28672).
    """

    rule: str = "nearest"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    nan: ClassVar[float] = 0x7F
    per_tensor_bytes: ClassVar[int] = 4

    def encode(self, amax: Tensor, largest_scale: float = E4M3.max) -> tuple[Tensor, Tensor | None]:
        """See `ScaleCodec`."""
        largest = amax.amax() if amax.numel() else amax.new_zeros(())
        per_tensor_scale = largest / (E2M1.max * largest_scale)
        per_tensor_scale = per_tensor_scale.clamp(min=_SMALLEST_PER_TENSOR_SCALE)
        scale = (amax / E2M1.max) / per_tensor_scale
        return E4M3.encode(scale.clamp(min=E4M3.smallest)), per_tensor_scale

    def decode(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        assert per_tensor_scale is not None
        return per_tensor_scale * E4M3.decode(codes & 0x7F)  # the sign bit is ignored: UE4M3

    def reciprocal(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`; operations are in torchao's order, so that codes agree bit for bit."""
        assert per_tensor_scale is not None
        return (1.0 / per_tensor_scale) / E4M3.decode(codes)


_EXPONENT_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    # amax / scale in [4, 8): the top of a group may clip to 6, by up to a quarter
    "floor": lambda amax: floor_exponent(amax) - _E2M1_MAX_EXPONENT,
    # amax / scale in (2, 4]: never clips, wastes the codes 4 and 6
    "ceil": lambda amax: ceil_exponent(amax) - _E2M1_MAX_EXPONENT,
    # amax / scale in (3, 6]: the smallest power of two that never clips
    "rceil": lambda amax: ceil_exponent(amax / E2M1.max),
    # amax / scale in [3.5, 7)
    "even": lambda amax: even_exponent(amax) - _E2M1_MAX_EXPONENT,
}


@dataclass(frozen=True)
class E8M0Scale:
    """MXFP4: a power of two a group, 2^(code - 127), by a named rule; code 255 is NaN."""

    rule: str = "floor"
    dtype: ClassVar[torch.dtype] = torch.float8_e8m0fnu
    nan: ClassVar[float] = 0xFF
    per_tensor_bytes: ClassVar[int] = 0
    rules: ClassVar[tuple[str, ...]] = tuple(_EXPONENT_RULES)

    def encode(self, amax: Tensor, largest_scale: float = E4M3.max) -> tuple[Tensor, Tensor | None]:
        """See `ScaleCodec`."""
        exponent = _EXPONENT_RULES[self.rule](amax).clamp(-_E8M0_BIAS, _E8M0_BIAS)
        return (exponent + _E8M0_BIAS).to(torch.uint8), None

    def decode(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        return decode_e8m0(codes)

    def reciprocal(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`; exact, for 2 * 127 - code is the code of the reciprocal."""
        return decode_e8m0(2 * _E8M0_BIAS - codes.to(torch.int32))


@dataclass(frozen=True)
class ChannelScale:
    """FP8: a float32 scale a row, amax / 448, so that the largest code is 448.

    It is what compressed-tensors (`strategy: channel`), vLLM and torchao store for weights, and
    what they take a token for dynamic activations.
    """

    rule: str = "amax"
    dtype: ClassVar[torch.dtype] = torch.float32
    nan: ClassVar[float] = torch.nan
    per_tensor_bytes: ClassVar[int] = 0

    def encode(self, amax: Tensor, largest_scale: float = E4M3.max) -> tuple[Tensor, Tensor | None]:
        """See `ScaleCodec`."""
        return (amax / E4M3.max).clamp(min=_SMALLEST_PER_TENSOR_SCALE), None

    def decode(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        return codes

    def reciprocal(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        return 1.0 / codes


@dataclass(frozen=True)
class FittedScale:
    """256 scales a tensor, evenly spaced in the logarithm from its smallest to its largest.

    `per_tensor_scale` is float32 [2]: log2 of the smallest, and the step between two in log2. No
    hardware reads such scales: they show what MXFP4 loses by powers of two.
    """

    rule: str = "fitted"
    dtype: ClassVar[torch.dtype] = torch.uint8
    nan: ClassVar[None] = None
    per_tensor_bytes: ClassVar[int] = 8

    def encode(self, amax: Tensor, largest_scale: float = E4M3.max) -> tuple[Tensor, Tensor | None]:
        """See `ScaleCodec`."""
        exponent = (amax / E2M1.max).clamp(min=_SMALLEST_PER_TENSOR_SCALE).log2()
        used = exponent[amax > 0] if bool((amax > 0).any()) else exponent.new_zeros(1)
        low, step = used.amin(), (used.amax() - used.amin()) / 255
        codes = ((exponent - low) / step.clamp(min=1e-30)).round().clamp(0, 255)
        return codes.to(torch.uint8), torch.stack((low, step))

    def decode(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        assert per_tensor_scale is not None
        return torch.exp2(per_tensor_scale[0] + codes.to(torch.float32) * per_tensor_scale[1])

    def reciprocal(self, codes: Tensor, per_tensor_scale: Tensor | None) -> Tensor:
        """See `ScaleCodec`."""
        return 1.0 / self.decode(codes, per_tensor_scale)
