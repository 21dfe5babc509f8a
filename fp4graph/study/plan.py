"""Plans of an ablation: which trials, from options, by name, or from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4graph import OptionError, Selector
from fp4graph.files import read_text
from fp4graph.study.trial import (
    Calibrations,
    Direction,
    Trial,
    check_by,
    schemes,
    selectors_by,
    trials,
)

if TYPE_CHECKING:
    from fp4graph import Report, Scheme

JUST_ONE = "give selectors (--select, as often as you like), --by or --plan, just one"
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "only": ("only",),
    "except": ("except",),
    "both": ("only", "except"),
}


@dataclass(frozen=True)
class Group:
    """Combinations as texts: what options or a file ask for.

    Attributes:
        select: selectors.
        by: one trial for each `role`, `block` or `role,block` of the model; several are united.
        format: formats, with a scale rule where it is not the default: `mxfp4:rceil`.
        activations: `none` for W4A16, `same` for W4A4.
        quantizer: how codes are found.
        direction: `only`, `except` or `both`.
    """

    select: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    format: tuple[str, ...] = ("nvfp4",)
    activations: tuple[str, ...] = ("none",)
    quantizer: tuple[str, ...] = ("rtn",)
    direction: str = "only"

    def read(self, calibrations: Calibrations | None = None) -> Combinations:
        """Read the texts, as far as that can be done without a model.

        Raises:
            OptionError: neither or both of `select` and `by`, or a value that does not exist.
            SelectorError: a selector that cannot be parsed.
        """
        if bool(self.select) == bool(self.by):
            raise OptionError(JUST_ONE)
        if self.direction not in DIRECTIONS:
            raise OptionError(f"direction {self.direction!r}: expected {', '.join(DIRECTIONS)}")
        for what in self.by:
            check_by(what)
        return Combinations(
            tuple(map(Selector, self.select)),
            self.by,
            tuple(schemes(self.format, self.activations, self.quantizer, calibrations)),
            DIRECTIONS[self.direction],
        )


@dataclass(frozen=True)
class Combinations:
    """Trials that are all combinations of these; `by` as in `Group`."""

    select: tuple[Selector, ...]
    by: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    directions: tuple[Direction, ...]

    def trials(self, report: Report) -> list[Trial]:
        """Return the dense model, then all combinations.

        Args:
            report: of the model, every block linear in it selected.
        """
        found = [Selector(each) for what in self.by for each in selectors_by(report, what)]
        return trials([*self.select, *found], self.schemes, self.directions)


PLANS: dict[str, Group] = {
    "roles": Group(by=("role",)),
    "blocks": Group(by=("block",)),
    "grid": Group(by=("role,block",)),
    "paper": Group(
        by=("role", "block", "role,block"),
        format=("nvfp4", "mxfp4"),
        activations=("none", "same"),
        direction="both",
    ),
}
"""Plans by name; `paper` is all that 2603.08747 measured, in both isolations and both modes."""


def read_plan(name: str, given: dict[str, Any]) -> tuple[Group, ...]:
    """Return a plan by its name or file, with the options that a user gave in place of its own.

    A file has tables `[[trials]]`, each with `select` or `by` and any of `format`, `activations`,
    `quantizer`, `direction`, as texts or lists of them.

    Raises:
        OptionError: no such plan, or a file that cannot be read as one.
    """
    if name in PLANS:
        return (replace(PLANS[name], **given),)
    if not name.endswith(".toml"):
        raise OptionError(f"--plan {name!r}: expected {', '.join(PLANS)} or a file that ends .toml")
    try:
        tables = tomllib.loads(read_text(Path(name))).get("trials")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"cannot read the plan {name}: {error}") from None
    if not isinstance(tables, list) or not tables:
        raise OptionError(f"the plan {name} has no [[trials]]")
    return tuple(
        replace(_group(table, f"{name}, [[trials]] {i}"), **given)
        for i, table in enumerate(tables, 1)
    )


def _group(table: Any, where: str) -> Group:
    known = [field.name for field in fields(Group)]
    unknown = sorted(set(table).difference(known))
    if unknown:
        raise OptionError(f"{where}: no such key {unknown[0]!r}; keys are {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(each, str) for each in texts):
            raise OptionError(f"{where}: {key} is {value!r}, expected a text or a list of texts")
        values[key] = value if key == "direction" else tuple(texts)
    return Group(**values)


def by_information(plan: Sequence[Trial], sizes: dict[Trial, int]) -> list[Trial]:
    """Order trials so that the first tell most: large sets first, then blocks far apart.

    Args:
        plan: the trials.
        sizes: how many linears each trial's selector picks.
    """
    width = max(len(plan) - 1, 1).bit_length()

    def spread(index: int) -> int:
        return int(f"{index:0{width}b}"[::-1], 2)

    places = {trial: index for index, trial in enumerate(plan)}
    return sorted(plan, key=lambda trial: (-sizes[trial], spread(places[trial])))
