"""What runs how: selectors paired with schemes, later entries winning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fp4graph.errors import OptionError, SelectorError
from fp4graph.linears.selector import Selector, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.formats import BlockFormat
    from fp4graph.linears.tags import LinearTag, Role
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
    def of(cls, select: Select, default: Scheme) -> Policy:
        """Parse `select`.

        Args:
            select: a selector, which `default` applies to, a mapping, or a policy as it is.
            default: scheme for a plain selector, and for what a mapping's options leave open.

        Raises:
            SelectorError: a selector that cannot be parsed.
            OptionError: a mapping value that cannot be read.
        """
        if isinstance(select, Policy):
            return select
        if isinstance(select, str | Selector):
            return cls(((_selector(select), default),))
        given: object = select  # the annotation is no promise
        if not isinstance(given, Mapping) or not given:
            raise OptionError(f"select={select!r}: expected a selector or a mapping of selectors")
        return cls(
            tuple(
                (_selector(text), None if value is None else default.merged(value))
                for text, value in select.items()
            )
        )

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


Select = str | Selector | Policy | Mapping[str, "str | BlockFormat | Mapping[str, object] | None"]
"""A selector; a mapping from selector to a format, to options of `Scheme`, or to None; a policy."""


def _selector(text: str | Selector) -> Selector:
    return text if isinstance(text, Selector) else parse(text)
