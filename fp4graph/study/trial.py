"""Trials of an ablation: what is scored, and the row that comes of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fp4graph import Activations, ModelError, OptionError, Policy, Scheme, Selector, get_format
from fp4graph.hf_quantizer import packed_config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fp4graph import Report
    from fp4graph.models import LoadedModel

Direction = Literal["only", "except"]
_ALL = Selector("all")


@dataclass(frozen=True)
class Trial:
    """One model to score.

    Attributes:
        select: a selector with the scheme that it runs in, or several: a mix; none of it in the
            dense model.
        direction: `only` puts the selection in FP4, `except` all block linears but the selection.
        name: what a user calls it; no part of what it is.
        packed: a model that was converted so and is scored as it is; None rewrites the dense one.
    """

    select: Policy
    direction: Direction = "only"
    name: str = field(default="", compare=False)
    packed: LoadedModel | None = None

    @classmethod
    def of_packed(cls, packed: LoadedModel) -> Trial:
        """Return the trial of a model that was converted.

        Raises:
            ModelError: it was not.
        """
        config = packed_config(getattr(packed.model, "config", None))
        if config is None:
            raise ModelError(f"{packed.name} was not converted: its weights are dense")
        return cls(config.policy, "only", Path(packed.name).name, packed)

    @classmethod
    def of(
        cls,
        selector: str,
        format: str = "nvfp4",
        activations: str = "none",
        direction: Direction = "only",
        quantizer: str = "rtn",
    ) -> Trial:
        """Read a trial from texts; `selector` may be a mapping in JSON."""
        return cls(Policy.of(selector, Scheme.of(format, quantizer, activations)), direction)

    def __str__(self) -> str:
        if self == DENSE:
            return "the dense model"
        if self.name:
            return self.name
        ways = " and ".join(map(str, self.select.schemes))
        return f"{self.direction} {self.select.text} in {ways}"

    @property
    def policy(self) -> Policy:
        """What runs how."""
        if self.direction == "only":
            return self.select
        ((selector, scheme),) = self.select.entries
        return Policy(((_ALL, scheme), (selector, None)))

    @property
    def base(self) -> Policy | None:
        """What trials of this direction have in common, None for the dense model."""
        if self.direction == "only":
            return None
        return Policy(((_ALL, self.select.entries[0][1]),))

    @property
    def facts(self) -> dict[str, Any]:
        """The trial as rows and keys have it; of a mix, what is in it with commas between."""
        ways = self.select.schemes
        return {
            "selector": self.select.text,
            "format": _listed(str(way.format) for way in ways) if ways else None,
            "activations": _listed(str(way.activations) for way in ways) or str(Activations.NONE),
            "quantizer": _listed(str(way.quantizer) for way in ways) or "rtn",
            "direction": self.direction,
        }


def _listed(names: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(names))


DENSE = Trial(Policy(((Selector("none"), None),)))


class OfTrial:
    """What every row of a trial says of it, from its fields."""

    selector: str
    format: str | None
    activations: str
    quantizer: str
    direction: Direction
    name: str

    @property
    def is_dense(self) -> bool:
        """Whether it is the dense model's."""
        return self.format is None

    @property
    def activation_mode(self) -> str:
        """The field's name for its activations: `W4A16`, or several with commas between."""
        return mode_of(self.format or "nvfp4", self.activations)

    @property
    def label(self) -> str:
        """What is in FP4, for people: its name if it has one."""
        return "dense" if self.is_dense else self.name or set_of(self)


def set_of(row: OfTrial) -> str:
    """Return what is in FP4, for people."""
    return f"all but {row.selector}" if row.direction == "except" else row.selector


@dataclass(frozen=True)
class Row(OfTrial):
    """What a trial measured; the fields are the keys of the JSON lines.

    Attributes:
        selector: see `Trial`, and so are `format`, `activations`, `quantizer` and `direction`.
            Of a mix it is the mapping in JSON, and the others have commas in them.
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
        name: what the user calls the trial; empty without a name.
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
    name: str = ""


def mode_of(format: str, activations: str) -> str:
    """Return the field's name for formats and activation modes, commas between in all of them.

    >>> mode_of("nvfp4", "none"), mode_of("nvfp4,fp8", "same")
    ('W4A16', 'W4A4,W8A8')
    """
    bits = dict.fromkeys(get_format(each).bits for each in format.split(","))
    return ",".join(
        Activations(each).mode(size) for each in activations.split(",") for size in bits
    )


def trials(
    selectors: Mapping[Selector, str], ways: Sequence[Scheme], directions: Sequence[Direction]
) -> list[Trial]:
    """Return every combination; `except` brings `all` to compare with.

    Args:
        selectors: each with its name, or with an empty one.
        ways: how they run.
        directions: see `Trial`.
    """
    plan = []
    for scheme, direction in itertools.product(ways, directions):
        names = {_ALL: "", **selectors} if direction == "except" else selectors
        plan += [
            Trial(Policy(((each, scheme),)), "only" if each == _ALL else direction, name)
            for each, name in names.items()
            if str(each) != "none"
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
