"""Trials of an ablation: what is scored, and the row that comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from fp4graph import Calibration, OptionError, Policy, Report, Scheme, Selector, get_format

if TYPE_CHECKING:
    from collections.abc import Sequence

Direction = Literal["only", "except"]
Calibrations = Mapping[tuple[str, str], Calibration]
"""Codes found with data, by format and quantizer."""


@dataclass(frozen=True)
class Trial:
    """One model to score.

    Attributes:
        selector: canonical text; `none` is the dense model.
        format: of the FP4 weights; None for the dense model.
        activations: `none` or `same`.
        direction: `only` puts the selection in FP4, `except` all block linears but the selection.
        quantizer: how the codes are found; see `fp4graph.quantize`.
    """

    selector: str
    format: str | None
    activations: str = "none"
    direction: Direction = "only"
    quantizer: str = "rtn"

    def __str__(self) -> str:
        if self.format is None:
            return "the dense model"
        how = "" if self.quantizer == "rtn" else f", {self.quantizer}"
        return f"{self.direction} {self.selector} in {self.format} {mode_of(self.activations)}{how}"

    def policy(self, calibrations: Calibrations) -> Policy | None:
        """Return what to rewrite, None for nothing."""
        if self.format is None:
            return None
        activations = None if self.activations == "none" else self.activations
        calibration = calibrations.get((self.format, self.quantizer))
        scheme = Scheme.of(self.format, self.quantizer, activations, calibration=calibration)
        if self.direction == "only":
            return Policy.of(self.selector, scheme)
        return Policy.of({"all": {}, self.selector: None}, scheme)

    def base(self, calibrations: Calibrations) -> Policy | None:
        """Return what trials of this direction have in common, None for the dense model."""
        if self.direction == "only":
            return None
        return replace(self, selector="all", direction="only").policy(calibrations)


DENSE = Trial("none", None)


def mode_of(activations: str) -> str:
    """Return how a mode is called: `W4A16` for `none`, `W4A4` for `same`."""
    return "W4A16" if activations == "none" else "W4A4"


@dataclass(frozen=True)
class Row:
    """What a trial measured; the fields are the keys of the JSON lines.

    Attributes:
        selector: see `Trial`, and so are `format`, `activations`, `quantizer` and `direction`.
        ppl: perplexity; None where it is beyond float64.
        dnll: mean NLL less the dense model's on the same tokens, nats.
        dnll_se: its standard error, windows being independent; None with one window.
        kl: mean KL divergence of the model from the dense one, nats.
        kl_se: its standard error.
        top1: share of tokens where both models' likeliest token is the same.
        linears: linears in FP4.
        parameters: their weights' values.
        bytes_dense: their size in the model's dtype.
        bytes_packed: their size in FP4.
        dnll_per_mb: dnll for each MB (10^6 bytes) that FP4 saves; None where it saves nothing.
        dnll_low: lower end of dnll's 95 % bootstrap interval, whole windows drawn; None with one.
        dnll_high: its upper end.
        kl_p50: median of KL over tokens.
        kl_p90: the value that 90 % of tokens stay below.
        kl_p99: likewise 99 %.
        kl_per_mb: kl for each MB saved.
        dnll_per_mparam: dnll for each 10^6 values in FP4; None for the dense model.
        kl_per_mparam: kl likewise.
        noise: of the dense model, how far its NLL on the two halves of the text is apart, nats;
            None elsewhere, and with fewer than four windows.
        noise_se: that difference's standard error.
        probe: share of the probe's questions that are answered right; None without a probe.
        probe_same: share of them where the choice is the dense model's.
    """

    selector: str
    format: str | None
    activations: str
    quantizer: str
    direction: Direction
    ppl: float | None
    dnll: float
    dnll_se: float | None
    kl: float
    kl_se: float | None
    top1: float
    linears: int
    parameters: int
    bytes_dense: int
    bytes_packed: int
    dnll_per_mb: float | None
    dnll_low: float | None
    dnll_high: float | None
    kl_p50: float
    kl_p90: float
    kl_p99: float
    kl_per_mb: float | None
    dnll_per_mparam: float | None
    kl_per_mparam: float | None
    noise: float | None = None
    noise_se: float | None = None
    probe: float | None = None
    probe_same: float | None = None


class _OfTrial(Protocol):
    @property
    def selector(self) -> str: ...
    @property
    def direction(self) -> Direction: ...


def set_of(row: _OfTrial) -> str:
    """Return what is in FP4, for people."""
    return f"all but {row.selector}" if row.direction == "except" else row.selector


def trials(
    selectors: Sequence[str],
    formats: Sequence[str],
    activations: Sequence[str],
    directions: Sequence[Direction],
    quantizers: Sequence[str] = ("rtn",),
    calibrations: Calibrations | None = None,
) -> list[Trial]:
    """Return the dense model, then every combination; `except` brings `all` to compare with.

    Args:
        selectors: what is in FP4.
        formats: of the weights.
        activations: `none`, `same`.
        directions: `only`, `except`.
        quantizers: how codes are found.
        calibrations: codes found with data, by format and quantizer.

    Raises:
        SelectorError: a selector cannot be parsed.
        OptionError: a format, activation mode or quantizer that does not exist, or a quantizer
            that a format has no use for.
    """
    canonical = list(dict.fromkeys(str(Selector(text)) for text in selectors))
    plan = [DENSE]
    for format, mode, how in itertools.product(formats, activations, quantizers):
        calibration = (calibrations or {}).get((str(get_format(format)), how))
        activated = None if mode == "none" else mode
        scheme = Scheme.of(format, how, activated, calibration=calibration)
        for direction in directions:
            names = ["all", *canonical] if direction == "except" else canonical
            plan += [
                Trial(name, scheme.format.name, mode, "only" if name == "all" else direction, how)
                for name in names
                if name != "none"
            ]
    return list(dict.fromkeys(plan))


def selectors_by(report: Report, what: str) -> list[str]:
    """Return one selector a role, a block, or both, for the block linears of a model.

    Args:
        report: of the model, every linear in it.
        what: `role`, `block` or `role,block`.

    Raises:
        OptionError: another `what`.
    """
    parts = check_by(what)
    linears = [row for row in report if row.selected]
    if parts == ("role",):
        found = [row.role for row in linears]
    elif parts == ("block",):
        found = [f"blocks={row.block}" for row in linears]
    else:
        found = [f"{row.role},blocks={row.block}" for row in linears]
    return list(dict.fromkeys(found))


def check_by(what: str) -> tuple[str, ...]:
    """Return the parts of a `--by`.

    Raises:
        OptionError: it is not `role`, `block` or `role,block`.
    """
    parts = tuple(sorted(part.strip() for part in what.split(",")))
    if parts not in (("role",), ("block",), ("block", "role")):
        raise OptionError(f"--by {what!r}: expected role, block or role,block")
    return parts
