"""Plans of an ablation: which trials, from options, by name, or from a TOML file."""

from __future__ import annotations

import itertools
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4graph import OptionError, Policy, Scheme, Selector, get_format
from fp4graph.files import read_text
from fp4graph.policy import as_mapping
from fp4graph.study.trial import DENSE, Direction, Trial, check_by, selectors_by, trials

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fp4graph import Calibration, Report
    from fp4graph.policy import Select

JUST_ONE = "give selectors (--select, as often as you like, or --mix), --by or --plan, just one"
DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "only": ("only",),
    "except": ("except",),
    "both": ("only", "except"),
}
_FORMAT, _QUANTIZER = "nvfp4", "rtn"


@dataclass(frozen=True)
class Group:
    """Combinations as texts: what options, a file or a call ask for.

    Attributes:
        select: selectors, or mixes: mappings as `backend` takes them, also as texts in JSON.
        by: one trial for each `role`, `block` or `role,block` of the model; several are united.
        name: what the first of `select` are called.
        format: formats, with a scale rule where it is not the default: `mxfp4:rceil`; of none
            `nvfp4`, or what the calibrations are for.
        activations: `none` for W4A16, `same` for W4A4, `int8` for W4A8.
        quantizer: how codes are found; of none `rtn`, or what the calibrations were made with.
        direction: `only`, `except` or `both`; a mix is always `only`.
    """

    select: tuple[Select, ...] = ()
    by: tuple[str, ...] = ()
    name: tuple[str, ...] = ()
    format: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("none",)
    quantizer: tuple[str, ...] = ()
    direction: str = "only"

    def read(self, calibrations: Sequence[Calibration] = ()) -> Combinations:
        """Read the texts, as far as that can be done without a model.

        Args:
            calibrations: codes found with data. Those of a plain selector are for the quantizer of
                that name; in a mix `rtn` stands for what a calibration has, as in `backend`.

        Raises:
            OptionError: neither or both of `select` and `by`, or a value that does not exist.
            SelectorError: a selector that cannot be parsed.
            CalibrationError: a calibration is for another format.
        """
        if bool(self.select) == bool(self.by):
            raise OptionError(JUST_ONE)
        if self.direction not in DIRECTIONS:
            raise OptionError(f"direction {self.direction!r}: expected {', '.join(DIRECTIONS)}")
        for what in self.by:
            check_by(what)
        if len(self.name) > len(self.select):
            known = f"{len(self.name)} names for {len(self.select)} selectors"
            raise OptionError(f"{known}: a name is for one of them each, in their order")
        schemes = self._schemes(calibrations)
        selectors: dict[Selector, str] = {}
        mixes: list[Trial] = []
        for select, name in itertools.zip_longest(self.select, self.name, fillvalue=""):
            policies = self._policies(select, calibrations)
            if as_mapping(select) is not None or isinstance(select, Policy):
                mixes += [Trial(policy, name=name) for policy in policies]
            else:
                selectors[policies[0].entries[0][0]] = name
        directions = DIRECTIONS[self.direction]
        return Combinations(selectors, self.by, tuple(schemes), directions, tuple(mixes))

    def _schemes(self, calibrations: Sequence[Calibration]) -> list[Scheme]:
        known = [(str(format), str(how)) for each in calibrations for format, how in each.ways]
        formats = self.format or tuple(dict.fromkeys(format for format, _ in known)) or (_FORMAT,)
        found = []
        for format in formats:
            own = [how for each, how in known if each == str(get_format(format))]
            for how in self.quantizer or tuple(dict.fromkeys(own)) or (_QUANTIZER,):
                for mode in self.activations:
                    scheme = Scheme.read(format, how, mode, "auto")
                    way = scheme.format, scheme.quantizer
                    with_codes = [each for each in calibrations if way in each.ways]
                    found.append(scheme.calibrated(with_codes))
        return list(dict.fromkeys(found))

    def _policies(self, select: Select, calibrations: Sequence[Calibration]) -> list[Policy]:
        """Return a mix in all ways that leave open what it says itself."""
        found = []
        for format, how, mode in itertools.product(
            self.format or (_FORMAT,), self.quantizer or (_QUANTIZER,), self.activations
        ):
            policy = Policy.read(select, Scheme.read(format, how, mode, "auto"))
            mix = as_mapping(select) is not None
            found.append(policy.calibrated(calibrations) if mix else policy)
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Combinations:
    """Trials that are all combinations of these.

    Attributes:
        select: selectors with their names.
        by: as in `Group`.
        schemes: how selectors run.
        directions: see `Trial`.
        mixes: trials that say themselves how they run.
    """

    select: Mapping[Selector, str]
    by: tuple[str, ...]
    schemes: tuple[Scheme, ...]
    directions: tuple[Direction, ...]
    mixes: tuple[Trial, ...]

    def trials(self, report: Report | None = None) -> list[Trial]:
        """Return the dense model, then all combinations.

        Args:
            report: of the model, every block linear in it selected; for `by`.
        """
        selectors = dict(self.select)
        for what in self.by:
            assert report is not None
            selectors |= dict.fromkeys(map(Selector, selectors_by(report, what)), "")
        found = [DENSE, *trials(selectors, self.schemes, self.directions), *self.mixes]
        return list(dict.fromkeys(found))


def converted(packed: Sequence[Trial]) -> Combinations:
    """Return the trials of models that were converted as a group of their own."""
    return Combinations({}, (), (), (), tuple(packed))


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

    A file has tables `[[trials]]`, each with `select` or `by` and any of `name`, `format`,
    `activations`, `quantizer`, `direction`, as texts or lists of them. A table in `select` is
    a mix.

    Raises:
        OptionError: no such plan, or a file that cannot be read as one.
    """
    if name in PLANS:
        return (replace(PLANS[name], **given),)
    if not name.endswith(".toml"):
        raise OptionError(f"--plan {name!r}: expected {', '.join(PLANS)} or a file that ends .toml")
    tables = _toml(Path(name), "plan").get("trials")
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
        kinds = (str, dict) if key == "select" else (str,)
        texts = [value] if isinstance(value, kinds) else value
        if not isinstance(texts, list) or not all(isinstance(each, kinds) for each in texts):
            raise OptionError(f"{where}: {key} is {value!r}, expected a text or a list of texts")
        values[key] = value if key == "direction" else tuple(texts)
    return Group(**values)


def read_mix(file: Path) -> tuple[Select, str]:
    """Return a mix and its name, empty if it has none, from a TOML file.

    The file has a table `[select]`, from selector to format, to options, or to `"dense"`, and may
    have a `name` above it:

        name = "best"
        [select]
        all = "nvfp4"
        "down,blocks<3" = "mxfp4"
        v = "dense"

    Raises:
        OptionError: the file cannot be read as one.
    """
    found = _toml(file, "mix")
    unknown = sorted(set(found) - {"name", "select"})
    select, name = found.get("select"), found.get("name", "")
    if unknown or not isinstance(select, dict | str) or not isinstance(name, str):
        raise OptionError(
            f'the mix {file}: expected a table [select] with lines such as all = "nvfp4" and '
            'v = "dense", and at most a name = "..." above it'
            + (f"; there is {unknown[0]!r}" if unknown else "")
        )
    return select, name


def _toml(file: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"cannot read the {what} {file}: {error}") from None


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
