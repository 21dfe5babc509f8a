"""How a selected linear runs: format, quantizer, activations, kernel, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from fp4graph.errors import OptionError
from fp4graph.formats import BlockFormat, get_format
from fp4graph.kernels import check_name
from fp4graph.quantizers import RTN, Quantizer, check_quantizer

if TYPE_CHECKING:
    from fp4graph.quantizers import Calibration

INT8_ERROR = 0.015
"""Relative L2 error that rounding activations to 8 bits in groups stays within."""


class Activations(StrEnum):
    """What is done to a selected linear's input at each call.

    `NONE` leaves it (W4A16). `SAME` quantises and dequantises it in the weight's format (W4A4).
    `INT8` lets the kernel round it to 8 bits in groups, an approximation (W4A8).
    """

    NONE = "none"
    SAME = "same"
    INT8 = "int8"

    @classmethod
    def of(cls, value: str | None) -> Activations:
        """Read an `activations=` option; None is `none`.

        Raises:
            OptionError: no such mode.
        """
        try:
            return cls(value or "none")
        except ValueError:
            known = ", ".join(map(repr, map(str, cls)))
            raise OptionError(f"activations={value!r}: expected None, {known}") from None

    @property
    def mode(self) -> str:
        """The field's name for it: `W4A16`, `W4A4` or `W4A8`."""
        return {"none": "W4A16", "same": "W4A4", "int8": "W4A8"}[self]


@dataclass(frozen=True)
class Scheme:
    """How a selected linear runs.

    Attributes:
        format: of the weight.
        quantizer: how the codes are found; see `fp4graph.quantize`.
        activations: what is done to its input.
        kernel: name of the kernel, or `auto`.
        calibration: where the codes are, if they were found with data.
    """

    format: BlockFormat
    quantizer: Quantizer = RTN
    activations: Activations = Activations.NONE
    kernel: str = "auto"
    calibration: Calibration | None = None

    @property
    def rotation(self) -> int:
        """Block of the rotation of weight and input; 0 for none."""
        return self.quantizer.rotation

    @property
    def smooths(self) -> bool:
        """Whether inputs that come from a norm are divided, channel by channel."""
        return self.quantizer.strength > 0

    @classmethod
    def of(
        cls,
        format: str | BlockFormat = "nvfp4",
        quantizer: str | Quantizer = "rtn",
        activations: str | None = None,
        kernel: str = "auto",
        calibration: Calibration | None = None,
    ) -> Scheme:
        """Build a scheme from options as users give them.

        Args:
            format: a format or its name.
            quantizer: see `fp4graph.quantize`.
            activations: None or `none`, `same` for the weight's format, or `int8`.
            kernel: a kernel's name, or `auto`.
            calibration: what `quantizer` found with data; it counts for that quantizer alone, and
                for `rtn`, which then stands for it.

        Raises:
            OptionError: a value that does not exist.
            CalibrationError: a calibration for another format.
        """
        weight_format = get_format(format)
        if calibration is not None and str(quantizer) in ("rtn", str(calibration.quantizer)):
            calibration.check(weight_format)
            found = calibration.quantizer
        else:
            calibration = None
            found = check_quantizer(quantizer, weight_format)
        check_name(kernel)
        return cls(weight_format, found, Activations.of(activations), kernel, calibration)

    def merged(self, value: str | BlockFormat | Mapping[str, object]) -> Scheme:
        """Return the scheme that a mapping's value means, with this one for what it leaves open."""
        options: dict[str, object] = {
            "format": self.format,
            "quantizer": self.quantizer,
            "activations": self.activations,
            "kernel": self.kernel,
        }
        given = value if isinstance(value, Mapping) else {"format": value}
        unknown = sorted(set(given) - set(options))
        if unknown:
            known = ", ".join(options)
            raise OptionError(f"unknown option {unknown[0]!r} in select; options are {known}")
        return Scheme.of(**{**options, **given}, calibration=self.calibration)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.activations is Activations.INT8:
            return f"{self.format} {self.activations.mode}, activations within {INT8_ERROR:.1%}"
        how = "" if self.quantizer == RTN else f", {self.quantizer}"
        return f"{self.format} {self.activations.mode}{how}"
