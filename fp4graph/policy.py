"""What runs how: selectors paired with schemes, later entries winning."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fp4graph.errors import OptionError, SelectorError
from fp4graph.linears.selector import Selector, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.formats import BlockFormat
    from fp4graph.linears.tags import LinearTag, Role
    from fp4graph.quantizers import Calibration
    from fp4graph.scheme import Scheme


@dataclass(frozen=True)
class Decision:
    """What a policy says of one linear.

    Attributes:
        scheme: how it runs; None for dense.
        reason: the entry that said so.
        parts: which parts of a fused weight are meant, the others staying dense; all of them, or
            the role itself, elsewhere.
    """

    scheme: Scheme | None
    reason: str
    parts: tuple[Role, ...] = ()


@dataclass(frozen=True)
class Policy:
    """Selectors with their schemes, in the user's order; the last that matches wins."""

    entries: tuple[tuple[Selector, Scheme | None], ...]

    @classmethod
    def of(
        cls, select: Select, default: Scheme, calibrations: Sequence[Calibration] = ()
    ) -> Policy:
        """Parse `select`.

        Args:
            select: a selector, which `default` applies to, a mapping, such a mapping as a text in
                JSON, or a policy as it is.
            default: scheme for a plain selector, and for what a mapping's options leave open.
            calibrations: codes found with data; see `Scheme.calibrated`.

        Raises:
            SelectorError: a selector that cannot be parsed.
            OptionError: a mapping that cannot be read; a quantizer that needs data.
            CalibrationError: see `Scheme.calibrated`.
        """
        return cls.read(select, default).calibrated(calibrations)

    def calibrated(self, calibrations: Sequence[Calibration]) -> Policy:
        """Return the policy with the codes that its schemes need; see `Scheme.calibrated`.

        Raises:
            OptionError: a quantizer needs data, and no calibration has it.
            CalibrationError: the one calibration has nothing for a format.
        """

        def found(scheme: Scheme | None) -> Scheme | None:
            if scheme is None or scheme.calibration is not None:
                return scheme
            return scheme.calibrated(calibrations)

        return Policy(tuple((selector, found(scheme)) for selector, scheme in self.entries))

    @classmethod
    def read(cls, select: Select, default: Scheme) -> Policy:
        """Parse the same without codes, be they needed or not.

        Raises:
            SelectorError: a selector that cannot be parsed.
            OptionError: a mapping that cannot be read.
        """
        if isinstance(select, Policy):
            return select
        mapping = as_mapping(select)
        if mapping is None and isinstance(select, str | Selector):
            return cls(((_selector(select), default),))
        if not mapping:
            raise OptionError(f"select={select!r}: expected {_expected(select)}")
        return cls(
            tuple(
                (
                    _selector(text),
                    None if value is None or value == _DENSE else default.merged(value),
                )
                for text, value in mapping.items()
            )
        )

    @property
    def text(self) -> str:
        """A text that `of` reads as this policy: a selector, or a mapping in JSON."""
        if len(self.entries) == 1:
            return str(self.entries[0][0])
        return json.dumps(
            {str(selector): scheme and scheme.options for selector, scheme in self.entries}
        )

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every way in which something runs that is not dense."""
        return tuple(dict.fromkeys(scheme for _, scheme in self.entries if scheme))

    @property
    def counts_from_end(self) -> bool:
        """Whether a selector has a negative block index."""
        return any(selector.counts_from_end for selector, _ in self.entries)

    @property
    def is_none(self) -> bool:
        """Whether no linear of any model can be selected."""
        return all(scheme is None or str(selector) == "none" for selector, scheme in self.entries)

    def check(self, tags: Sequence[LinearTag]) -> None:
        """Check every selector against a model's linears; see `Selector.check`."""
        for selector, _ in self.entries:
            selector.check(tags)

    def decide(self, tag: LinearTag) -> Decision:
        """Say how a linear runs, and by which entry.

        Raises:
            SelectorError: see `Selector.picks`, or parts of a fused weight are to run in different
                ways.
        """
        decision = Decision(None, "not selected")
        schemes: dict[Role, Scheme] = {}
        for selector, scheme in self.entries:
            picked = selector.picks(tag)
            for part in picked:
                if scheme is None:
                    schemes.pop(part, None)
                else:
                    schemes[part] = scheme
            if picked:
                said = f"`{selector}`"
                decision = Decision(scheme, said if scheme else f"kept dense by {said}")
        ways = set(schemes.values())
        if len(ways) > 1:
            raise SelectorError(
                str(self),
                f"parts of the fused {tag.fqn} are to run in different ways "
                f"({' and '.join(sorted(map(str, ways)))}): give them one, or None",
            )
        parts = tuple(part for part in tag.parts if part in schemes)
        return replace(decision, scheme=next(iter(ways), None), parts=parts)

    def refuse_part(self, tag: LinearTag) -> None:
        """Raise what a part of a fused weight alone is, where its rows are not known.

        Raises:
            SelectorError: see `Selector.matches`.
        """
        for selector, _ in self.entries:
            selector.matches(tag)

    def __str__(self) -> str:
        if len(self.entries) == 1 and self.entries[0][1] is not None:
            return str(self.entries[0][0])
        return "; ".join(f"{selector}: {scheme or 'dense'}" for selector, scheme in self.entries)


_DENSE = "dense"  # None, for TOML, which has no such value


def as_mapping(select: object) -> Mapping[str, Any] | None:
    """Return a mapping as it is, or as a text in JSON has it; None where it is something else.

    Raises:
        OptionError: a text that begins with a brace and cannot be read, or has a selector twice.
    """
    if isinstance(select, Mapping):
        return select
    if not isinstance(select, str) or not select.lstrip().startswith("{"):
        return None
    text = select

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if twice:
            raise OptionError(f"select={text!r}: {twice[0]!r} stands in it twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        example = '{"all": "nvfp4", "v": null}'
        problem = f"column {error.colno}: {error.msg}; a mapping is JSON, such as {example}"
        raise OptionError(f"select={text!r}, {problem}") from None
    return dict(found)


def _expected(given: object) -> str:
    """Return what is expected where something else than a selector or a mapping is given."""
    if isinstance(given, list | tuple | set) and given and all(isinstance(x, str) for x in given):
        return f'one selector: "{",".join(given)}"'
    return 'a selector ("attn,blocks>4") or a mapping ({"all": "nvfp4", "v": None})'


Select = str | Selector | Policy | Mapping[str, "str | BlockFormat | Mapping[str, object] | None"]
"""A selector; a mapping from selector to a format, to options of `Scheme`, or to None; a policy."""


def _selector(text: str | Selector) -> Selector:
    return text if isinstance(text, Selector) else parse(text)
