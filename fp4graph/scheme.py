"""How a selected linear runs: format, quantizer, activations, kernel, each read once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from fp4graph.errors import CalibrationError, OptionError
from fp4graph.formats import FORMATS, NVFP4, BlockFormat, get_format
from fp4graph.kernels import check_name
from fp4graph.quantizers import RTN, Quantizer, check_quantizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.kernels.contract import Inputs
    from fp4graph.quantizers import Calibration

ENGINES = ("vllm", "sglang")
"""Engines that compute linears of one input as one, and want one per-tensor scale of them."""
INT8_ERROR = 0.015
"""Relative L2 error that rounding activations to 8 bits in groups stays within."""


class Activations(StrEnum):
    """What is done to a selected linear's input at each call.

    `NONE` leaves it (W4A16). `SAME` quantises and dequantises it in the weight's format (W4A4;
    for FP8, which takes a scale a token, W8A8).
    `INT8` lets the kernel round it to 8 bits in groups, an approximation (W4A8). `AUTO` lets it do
    so from as many rows on as that gains a tenth of the time on this machine.
    """

    NONE = "none"
    SAME = "same"
    INT8 = "int8"
    AUTO = "auto"

    @classmethod
    def of(cls, value: str | None) -> Activations:
        """Read an `activations=` option; None is `none`.

        Raises:
            OptionError: no such mode.
        """
        try:
            return cls(value or "none")
        except ValueError:
            known = ", ".join(f"{str(each)!r} ({each.mode()})" for each in cls)
            raise OptionError(f"activations={value!r}: expected None, {known}") from None

    def mode(self, bits: int = 4) -> str:
        """Return the field's name for it, with weights of so many bits: `W4A16`, `W8A8`."""
        return f"W{bits}A{ {'none': 16, 'same': bits, 'int8': 8, 'auto': '16/8'}[self] }"


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

    format: BlockFormat = NVFP4
    quantizer: Quantizer = RTN
    activations: Activations = Activations.NONE
    kernel: str = "auto"
    calibration: Calibration | None = None

    @property
    def inputs(self) -> Inputs:
        """What its kernel does to its input."""
        inputs: dict[Activations, Inputs] = {
            Activations.NONE: "exact",
            Activations.SAME: "same",
            Activations.INT8: "int8",
            Activations.AUTO: "auto",
        }
        return inputs[self.activations]

    @property
    def has_int8(self) -> bool:
        """Whether its kernel may round inputs to 8 bits."""
        return self.activations in (Activations.INT8, Activations.AUTO)

    @property
    def rotation(self) -> int:
        """Block of the rotation of weight and input; 0 for none."""
        return self.quantizer.rotation

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
            activations: None or `none`, `same` for the weight's format, `int8` or `auto`.
            kernel: a kernel's name, or `auto`.
            calibration: what `quantizer` found with data; it counts for that quantizer alone, and
                for `rtn`, which then stands for it.

        Raises:
            OptionError: a value that does not exist.
            CalibrationError: a calibration for another format.
        """
        found = cls.read(format, quantizer, activations, kernel)
        return found.calibrated(() if calibration is None else (calibration,))

    @classmethod
    def read(
        cls,
        format: str | BlockFormat,
        quantizer: str | Quantizer,
        activations: str | None,
        kernel: str,
    ) -> Scheme:
        """Build the same without codes, be they needed or not.

        Raises:
            OptionError: a value that does not exist.
        """
        weight_format = _format(format)
        check_name(kernel)
        found = Quantizer.parse(quantizer, weight_format)
        return cls(weight_format, found, Activations.of(activations), kernel)

    def calibrated(self, calibrations: Sequence[Calibration]) -> Scheme:
        """Return the scheme with the calibration that has codes for its format and quantizer.

        `rtn` stands for what a calibration has for the format.

        Raises:
            OptionError: the quantizer needs data, and none has it.
            CalibrationError: `rtn`, and no calibration has the format, or several have.
        """
        for each in calibrations:
            if (self.format, self.quantizer) in each.ways:
                return replace(self, calibration=each)
        if self.quantizer == RTN and calibrations:
            able = [c for c in calibrations if any(self.format == each for each, _ in c.ways)]
            if len(able) > 1:
                raise CalibrationError(f"several calibrations have {self.format}: say quantizer=")
            chosen = (able or calibrations)[0]
            return replace(self, quantizer=chosen.quantizer_of(self.format), calibration=chosen)
        check_quantizer(self.quantizer, self.format)
        return self

    def merged(self, value: str | BlockFormat | Mapping[str, object]) -> Scheme:
        """Return the scheme that a mapping's value means, with this one for what it leaves open.

        Raises:
            OptionError: an option or a value that does not exist.
        """
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
        return Scheme.read(**{**options, **given})  # type: ignore[arg-type]

    @property
    def options(self) -> str | dict[str, str]:
        """The value of a mapping that means it: its format, or options where others differ."""
        options = {"format": str(self.format)}
        if self.quantizer != RTN:
            options["quantizer"] = str(self.quantizer)
        if self.activations is not Activations.NONE:
            options["activations"] = str(self.activations)
        if self.kernel != "auto":
            options["kernel"] = self.kernel
        return options if len(options) > 1 else options["format"]

    def __str__(self) -> str:
        mode = self.activations.mode(self.format.bits)
        if self.has_int8:
            return f"{self.format} {mode}, activations within {INT8_ERROR:.1%}"
        how = "" if self.quantizer == RTN else f", {self.quantizer}"
        return f"{self.format} {mode}{how}"


def _format(given: str | BlockFormat) -> BlockFormat:
    """Return a format by its name.

    Raises:
        OptionError: no such format; says which one is near.
    """
    try:
        return get_format(given)
    except OptionError as error:
        near = difflib.get_close_matches(str(given).lower(), FORMATS, n=1)
        if not near:
            raise
        raise OptionError(f"{error}; did you mean {near[0]!r}?") from None
