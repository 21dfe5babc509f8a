"""Trials of an ablation: what is scored, and the row that comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fp4graph import Activations, Calibration, OptionError, Policy, Report, Scheme, Selector
from fp4graph.formats import get_format

if TYPE_CHECKING:
    from collections.abc import Sequence

Direction = Literal["only", "except"]
Calibrations = Mapping[tuple[str, str], Calibration]
"""Codes found with data, by the names of format and quantizer."""
_ALL = Selector("all")


@dataclass(frozen=True)
class Trial:
    """One model to score.

    Attributes:
        selector: which linears; `none` in the dense model.
        scheme: how they run; None for the dense model.
        direction: `only` puts the selection in FP4, `except` all block linears but the selection.
    """

    selector: Selector
    scheme: Scheme | None
    direction: Direction = "only"

    @classmethod
    def of(
        cls,
        selector: str,
        format: str,
        activations: str = "none",
        direction: Direction = "only",
        quantizer: str = "rtn",
    ) -> Trial:
        """Read a trial from texts."""
        return cls(Selector(selector), Scheme.of(format, quantizer, activations), direction)

    def __str__(self) -> str:
        if self.scheme is None:
            return "the dense model"
        return f"{self.direction} {self.selector} in {self.scheme}"

    @property
    def policy(self) -> Policy:
        """What runs how."""
        if self.scheme is None or self.direction == "only":
            return Policy(((self.selector, self.scheme),))
        return Policy(((_ALL, self.scheme), (self.selector, None)))

    @property
    def base(self) -> Policy | None:
        """What trials of this direction have in common, None for the dense model."""
        return None if self.direction == "only" else Policy(((_ALL, self.scheme),))

    @property
    def facts(self) -> dict[str, Any]:
        """The trial as rows and keys have it."""
        scheme = self.scheme
        return {
            "selector": str(self.selector),
            "format": scheme and scheme.format.name,
            "activations": scheme.activations if scheme else Activations.NONE,
            "quantizer": str(scheme.quantizer) if scheme else "rtn",
            "direction": self.direction,
        }


DENSE = Trial(Selector("none"), None)


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
        kl_p99: the value that 99 % of tokens stay below.
        kl_per_mb: kl for each MB saved.
        dnll_per_mparam: dnll for each 10^6 values in FP4; None for the dense model.
        kl_per_mparam: kl for each 10^6 values in FP4.
        noise: of the dense model, how far its NLL on the two halves of the text is apart, nats;
            None elsewhere, and with fewer than four windows.
        noise_se: that difference's standard error.
        probe: share of the probe's questions that are answered right; None without a probe.
        probe_same: share of them where the choice is the dense model's.
    """

    selector: str
    format: str | None
    activations: Activations
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

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Row:
        """Read a row from what JSON holds of it."""
        return cls(**{**result, "activations": Activations(result["activations"])})


class _OfTrial(Protocol):
    @property
    def selector(self) -> str: ...
    @property
    def direction(self) -> Direction: ...


def set_of(row: _OfTrial) -> str:
    """Return what is in FP4, for people."""
    return f"all but {row.selector}" if row.direction == "except" else row.selector


def schemes(
    formats: Sequence[str],
    activations: Sequence[str],
    quantizers: Sequence[str] = ("rtn",),
    calibrations: Calibrations | None = None,
) -> list[Scheme]:
    """Return every combination.

    Args:
        formats: of the weights.
        activations: `none`, `same`, `int8`.
        quantizers: how codes are found.
        calibrations: codes found with data.

    Raises:
        OptionError: a format, activation mode or quantizer that does not exist, or a quantizer
            that a format has no use for.
    """
    found = []
    for format, mode, how in itertools.product(formats, activations, quantizers):
        calibration = (calibrations or {}).get((str(get_format(format)), how))
        found.append(Scheme.of(format, how, mode, calibration=calibration))
    return found


def trials(
    selectors: Sequence[Selector], ways: Sequence[Scheme], directions: Sequence[Direction]
) -> list[Trial]:
    """Return the dense model, then every combination; `except` brings `all` to compare with."""
    plan = [DENSE]
    for scheme, direction in itertools.product(ways, directions):
        names = [_ALL, *selectors] if direction == "except" else selectors
        plan += [
            Trial(each, scheme, "only" if each == _ALL else direction)
            for each in names
            if each != DENSE.selector
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
