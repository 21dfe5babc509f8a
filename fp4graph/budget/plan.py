"""What is chosen among: linears, what each may run as, and what a whole plan comes to."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from math import fsum
from typing import TYPE_CHECKING

from fp4graph import OptionError, Policy, Selector
from fp4graph.linears.texts import selectors_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fp4graph import Scheme
    from fp4graph.linears.tags import LinearTag

    Schemes = tuple[Scheme | None, ...]

DENSE_BYTES = 2
"""Bytes of a dense value: weights that stay dense are deployed in 16 bits."""


@dataclass(frozen=True)
class Choice:
    """A way in which an item may run.

    Attributes:
        scheme: how; None for dense.
        kl: what it costs alone, nats a token.
        error: standard error of that.
        nbytes: bytes of its weights, scales included.
        us: microseconds of its linears at the number of rows that was asked for; None: not timed.
    """

    scheme: Scheme | None
    kl: float
    error: float
    nbytes: int
    us: float | None = None


@dataclass(frozen=True)
class Item:
    """Linears that run in one way: one, or a set that engines compute as one.

    Attributes:
        tags: the linears.
        choices: the ways, dense among them.
    """

    tags: tuple[LinearTag, ...]
    choices: tuple[Choice, ...]

    @property
    def parameters(self) -> int:
        """Values in all its weights."""
        return sum(tag.parameters for tag in self.tags)


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        kind: `bits` a value of the items' weights; `bytes` of them; `ms` that they take;
            `speedup` of them over dense; or `kl`, for which the fewest bytes are found.
        value: how much.
    """

    kind: str
    value: float

    @classmethod
    def of(cls, **given: float | None) -> Budget:
        """Return the one that is given.

        Raises:
            OptionError: none or several; none above zero.
        """
        found = {kind: value for kind, value in given.items() if value is not None}
        if len(found) != 1:
            raise OptionError(f"give one budget, just one: {', '.join(f'{k}=' for k in given)}")
        ((kind, value),) = found.items()
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"{kind}={value}: expected a number above zero")
        return cls(kind, value)

    @property
    def needs_times(self) -> bool:
        """Whether it is of time."""
        return self.kind in ("ms", "speedup")

    def limit(self, items: Sequence[Item]) -> float:
        """Return the most that a plan may cost: bytes, microseconds, or nats."""
        if self.kind == "bits":
            return self.value / 8 * sum(item.parameters for item in items)
        if self.kind == "ms":
            return self.value * 1000
        if self.kind == "speedup":
            return dense_plan(items).us / self.value
        return self.value

    def cost(self, choice: Choice) -> float:
        """Return what a choice costs of it."""
        if self.kind == "kl":
            return choice.kl
        if self.needs_times:
            assert choice.us is not None
            return choice.us
        return choice.nbytes

    def aim(self, choice: Choice) -> float:
        """Return what is to be small."""
        return choice.nbytes if self.kind == "kl" else choice.kl

    def allows(self, plan: Plan) -> bool:
        """Whether a plan is within it."""
        return fsum(self.cost(each) for each in plan.chosen) <= self.limit(plan.items)

    def __str__(self) -> str:
        return f"{self.value:g} {self.kind}"


@dataclass(frozen=True)
class Plan:
    """A choice for each item.

    Attributes:
        name: what found it.
        items: what is chosen for.
        chosen: the choices, item by item.
    """

    name: str
    items: tuple[Item, ...]
    chosen: tuple[Choice, ...]

    @property
    def kl(self) -> float:
        """Sum of what the choices cost alone, nats a token."""
        return fsum(each.kl for each in self.chosen)

    @property
    def kl_se(self) -> float:
        """Standard error of that sum, choices being independent."""
        return math.sqrt(fsum(each.error**2 for each in self.chosen))

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(each.nbytes for each in self.chosen)

    @property
    def bits(self) -> float:
        """Bits a value of all weights, scales included."""
        return 8 * self.nbytes / sum(item.parameters for item in self.items)

    @property
    def us(self) -> float:
        """Microseconds of all linears; NaN where one was not timed."""
        return fsum(math.nan if each.us is None else each.us for each in self.chosen)

    @property
    def schemes(self) -> Schemes:
        """What each item runs as."""
        return tuple(each.scheme for each in self.chosen)

    def policy(self, tags: Sequence[LinearTag]) -> Policy:
        """Return it in selectors, as short as they come: the way of most linears, and exceptions.

        Args:
            tags: all linears of the model.
        """
        ways: dict[Scheme | None, list[LinearTag]] = defaultdict(list)
        for item, choice in zip(self.items, self.chosen, strict=True):
            ways[choice.scheme] += item.tags
        ordered = sorted(ways, key=lambda scheme: (-len(ways[scheme]), str(scheme)))
        every = Selector("all")
        covers = {tag for members in ways.values() for tag in members}
        if covers != {tag for tag in tags if every.picks(tag)}:  # `all` would take in others
            ordered = [None, *(each for each in ordered if each is not None)]
        entries = [(every, ordered[0])]
        for scheme in ordered[1:]:
            text = " | ".join(selectors_for(ways[scheme], tags))
            entries.append((Selector(text), scheme))
        return Policy(tuple(entries))


def dense_plan(items: Iterable[Item]) -> Plan:
    """Return the plan that leaves all dense."""
    return uniform(None, items, "dense")


def uniform(scheme: Scheme | None, items: Iterable[Item], name: str) -> Plan:
    """Return the plan that runs all in one way; in dense where an item has no such choice."""
    several = tuple(items)
    chosen = tuple(
        next((each for each in item.choices if each.scheme == scheme), item.choices[0])
        for item in several
    )
    return Plan(name, several, chosen)
