"""Small floats by integer arithmetic: the bit patterns of E2M1 and E4M3, and of E8M0 scales.

Written with integer operations alone: the same lines hold on every device. No result depends on
which casts a GPU or a compiler supports (pytorch issue 187723: fp8 casts below sm_89).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fp4graph.private import is_faking

_F32_MANTISSA = 23
_F32_BIAS = 127


@dataclass(frozen=True)
class Minifloat:
    """A signed small float without infinities.

    Attributes:
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: what is subtracted from the exponent field.
        max: the largest finite magnitude; larger inputs saturate to it.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    max: float

    @property
    def sign_shift(self) -> int:
        """Position of the sign bit."""
        return self.exponent_bits + self.mantissa_bits

    @property
    def smallest(self) -> float:
        """The smallest positive value, a subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    def encode(self, x: Tensor) -> Tensor:
        """Round to nearest, ties to even codes, saturating.

        Args:
            x: finite float32, any shape.

        Returns:
            uint8 codes of the same shape; the sign of zero is kept.
        """
        assert x.dtype == torch.float32
        drop = _F32_MANTISSA - self.mantissa_bits
        sign = (x.view(torch.int32) >> 31) & 1
        magnitude = x.abs().clamp(max=self.max)
        bits = magnitude.view(torch.int32)
        rounded = (bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)) >> drop
        normal = rounded - ((_F32_BIAS - self.bias) << self.mantissa_bits)
        subnormal = (magnitude * (1 / self.smallest)).round().to(torch.int32)
        code = torch.where(magnitude < 2.0 ** (1 - self.bias), subnormal, normal)
        return ((sign << self.sign_shift) | code).to(torch.uint8)

    def round(self, x: Tensor) -> Tensor:
        """Return `decode(encode(x))` several times faster, for float32 but NaN."""
        y = x.clamp(-self.max, self.max)
        exponent = y.view(torch.int32) & 0x7F800000
        step = exponent.view(torch.float32).clamp_(min=2.0 ** (1 - self.bias))
        step *= 2.0**-self.mantissa_bits
        return y.div_(step).round_().mul_(step)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of uint8 codes."""
        # a table made under a fake mode is fake, and must not outlive it
        table = self.table(codes.device) if is_faking() else self._kept_table(codes.device)
        return table[codes.to(torch.int32)]

    @cache  # noqa: B019 - two instances exist, and their tables are small
    def _kept_table(self, device: torch.device) -> Tensor:
        return self.table(device)

    def table(self, device: torch.device) -> Tensor:
        """Return the float32 value of each code, NaN where the code is one (E4M3's 0x7F)."""
        code = torch.arange(2 << self.sign_shift, dtype=torch.int32, device=device)
        exponent = (code >> self.mantissa_bits) & ((1 << self.exponent_bits) - 1)
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        fraction = mantissa + ((exponent > 0).to(torch.int32) << self.mantissa_bits)
        value = torch.ldexp(
            fraction.to(torch.float32), exponent.clamp(min=1) - self.bias - self.mantissa_bits
        )
        value = torch.where(value > self.max, torch.nan, value)
        return torch.where((code >> self.sign_shift) == 1, -value, value)


E2M1 = Minifloat(exponent_bits=2, mantissa_bits=1, bias=1, max=6.0)
E4M3 = Minifloat(exponent_bits=4, mantissa_bits=3, bias=7, max=448.0)


def floor_exponent(x: Tensor) -> Tensor:
    """Return floor(log2 x) of positive float32 values from their exponent bits, as int32.

    `log2().floor()` rounds up just below powers of two. Zero and subnormals give -127.
    """
    return ((x.view(torch.int32) >> _F32_MANTISSA) & 0xFF) - _F32_BIAS


def ceil_exponent(x: Tensor) -> Tensor:
    """Return ceil(log2 x) of positive float32 values from their bits, as int32."""
    mantissa = x.view(torch.int32) & ((1 << _F32_MANTISSA) - 1)
    return floor_exponent(x) + (mantissa > 0).to(torch.int32)


def even_exponent(x: Tensor) -> Tensor:
    """Return floor(log2) of `x` rounded to one mantissa bit, so 1.75 and above round up."""
    return floor_exponent((x.view(torch.int32) + (1 << (_F32_MANTISSA - 2))).view(torch.float32))


def decode_e8m0(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) as float32; code 0 is the subnormal 2^-127, 255 is NaN."""
    exponent = codes.to(torch.int32)
    bits = torch.where(exponent == 0, 1 << (_F32_MANTISSA - 1), exponent << _F32_MANTISSA)
    value = bits.view(torch.float32)
    return torch.where(exponent == 0xFF, torch.nan, value)
