"""Syntax tree of a selector, kept in one normal form so that equal meanings mostly print alike.

Normal form: names before paths before groups, duplicates dropped, parentheses only where they
change the meaning, `|` and `&` flat and sorted. Nodes are frozen and compare by value; the column
of a term serves messages and takes no part in equality.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from fp4graph.linears.stacks import STACKS
from fp4graph.linears.tags import ROLE_GROUPS, LinearTag, Role

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

GROUPS = (*ROLE_GROUPS, "all", "none")
NAMES = (*(str(r) for r in Role if r is not Role.ADAPTER), *GROUPS)
SCOPES = (*STACKS, "all", "expert")
EXPERT_LINEARS = ("gate", "up", "gate_up", "down")

_COMPARE: dict[str, Callable[[int, int], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
_SUFFIXES = ((10**9, "B"), (10**6, "M"), (10**3, "K"))


class Node:
    """A set of linears. `accepts` is asked once for each part of a fused weight."""

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Tell whether the node holds `tag`, seen as the role `part`."""
        raise NotImplementedError

    def terms(self) -> Iterator[Term]:
        """Yield the leaves, each of which must match something in a model."""
        raise NotImplementedError


@dataclass(frozen=True)
class Term(Node):
    """A leaf."""

    column: int = field(default=1, compare=False, kw_only=True)

    @property
    def may_be_empty(self) -> bool:
        """Whether the term need not match anything."""
        return False

    @property
    def counts_from_end(self) -> bool:
        """Whether the number of blocks is needed."""
        return False

    def terms(self) -> Iterator[Term]:
        """Yield itself."""
        yield self


@dataclass(frozen=True)
class Name(Term):
    """A role or a group, by one of `NAMES`, in the main stack of blocks.

    `scope` is one of `SCOPES`: another stack, `all` for any, `expert` for experts' linears in any.
    """

    name: str
    scope: str = ""

    @property
    def may_be_empty(self) -> bool:
        """`none` asks for nothing."""
        return self.name == "none"

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Compare roles; a group holds its roles."""
        if self.scope == "expert":
            return tag.expert is not None and self.name in (part, tag.expert)
        if not (self.scope in ("all", tag.stack) or (not self.scope and tag.main)):
            return False
        if self.name == "all":
            return tag.is_block_linear
        if tag.role is Role.EXPERT:
            return self.name == tag.role
        if self.name in ROLE_GROUPS:
            return part in ROLE_GROUPS[self.name]
        return self.name in (part, tag.role)

    def __str__(self) -> str:
        return f"{self.scope}:{self.name}" if self.scope else self.name


@dataclass(frozen=True)
class Path(Term):
    """An fnmatch pattern on the module path."""

    pattern: str

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Match the whole path, letter case counting."""
        return fnmatchcase(tag.fqn, self.pattern)

    def __str__(self) -> str:
        return f"path:{self.pattern}"


@dataclass(frozen=True)
class Blocks(Term):
    """A comparison of the block index; negative indexes count from the end.

    `op` is one of `> >= < <=` with one value, `=` with both ends of a closed range, or `%` with a
    divisor and a rest.
    """

    op: str
    values: tuple[int, ...]

    @property
    def counts_from_end(self) -> bool:
        """Whether the number of blocks is needed."""
        return min(self.values) < 0

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Compare; a linear outside the blocks is in no range."""
        block, total = tag.block, tag.num_blocks
        if block is None:
            return False
        if self.op == "%":
            divisor, rest = self.values
            return block % divisor == rest
        values = [v if v >= 0 else v + (total or 0) for v in self.values]
        if self.op == "=":
            return values[0] <= block <= values[1]
        return _COMPARE[self.op](block, values[0])

    def __str__(self) -> str:
        match self.op, self.values:
            case "%", (divisor, rest):
                return f"blocks%{divisor}={rest}"
            case "=", (low, high):
                return f"blocks={low}" if low == high else f"blocks={low}..{high}"
            case _:
                return f"blocks{self.op}{self.values[0]}"


@dataclass(frozen=True)
class Size(Term):
    """A comparison of the number of values in the weight."""

    op: str
    parameters: int

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Compare; a fused weight counts whole."""
        return _COMPARE[self.op](tag.parameters, self.parameters)

    def __str__(self) -> str:
        for factor, suffix in _SUFFIXES:
            if self.parameters and self.parameters % factor == 0:
                return f"size{self.op}{self.parameters // factor}{suffix}"
        return f"size{self.op}{self.parameters}"


@dataclass(frozen=True)
class Not(Node):
    """An item that its clause removes."""

    inner: Node

    def terms(self) -> Iterator[Term]:
        """Yield the leaves of what is removed."""
        yield from self.inner.terms()

    def __str__(self) -> str:
        return f"!{_item(self.inner)}"


@dataclass(frozen=True)
class Clause(Node):
    """The union of `picks` (all block linears if none), within `bounds`, less `removes`."""

    picks: tuple[Node, ...]
    bounds: tuple[Node, ...] = ()
    removes: tuple[Not, ...] = ()

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Combine the three lists."""
        if self.picks:
            base = any(pick.accepts(tag, part) for pick in self.picks)
        else:
            base = tag.is_block_linear and tag.main
        return (
            base
            and all(bound.accepts(tag, part) for bound in self.bounds)
            and not any(removed.inner.accepts(tag, part) for removed in self.removes)
        )

    def terms(self) -> Iterator[Term]:
        """Yield the leaves of all three lists."""
        for node in (*self.picks, *self.bounds, *self.removes):
            yield from node.terms()

    def __str__(self) -> str:
        items = [_item(node) for node in (*self.picks, *self.bounds)]
        return ",".join([*items, *map(str, self.removes)])


@dataclass(frozen=True)
class Combination(Node):
    """Several nodes under one sign."""

    nodes: tuple[Node, ...]

    def terms(self) -> Iterator[Term]:
        """Yield the leaves of all nodes."""
        for node in self.nodes:
            yield from node.terms()


@dataclass(frozen=True)
class Meet(Combination):
    """What all nodes hold, `a & b`."""

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Ask all."""
        return all(node.accepts(tag, part) for node in self.nodes)

    def __str__(self) -> str:
        return " & ".join(f"({n})" if isinstance(n, Union) else str(n) for n in self.nodes)


@dataclass(frozen=True)
class Union(Combination):
    """What any node holds, `a | b`."""

    def accepts(self, tag: LinearTag, part: Role) -> bool:
        """Ask any."""
        return any(node.accepts(tag, part) for node in self.nodes)

    def __str__(self) -> str:
        return " | ".join(map(str, self.nodes))


def clause(items: Sequence[Node]) -> Node:
    """Build the normal form of `a,b,!c`; a lone parenthesis is what stands in it."""
    picks: list[Node] = []
    bounds: list[Node] = []
    removes: list[Not] = []
    for item in items:
        if isinstance(item, Not):
            removes.extend(Not(inner) for inner in _flat(item.inner))
        elif isinstance(item, Blocks | Size):
            bounds.append(item)
        else:
            picks.extend(_flat(item))
    if len(picks) == 1 and not bounds and not removes and not isinstance(picks[0], Term):
        return picks[0]
    kept = [Not(node) for node in _sorted(removed.inner for removed in removes)]
    return Clause(_sorted(picks), _sorted(bounds), tuple(kept))


def meet(nodes: Sequence[Node]) -> Node:
    """Build the normal form of `a & b`."""
    return _combine(Meet, nodes)


def union(nodes: Sequence[Node]) -> Node:
    """Build the normal form of `a | b`."""
    return _combine(Union, nodes)


def _combine(kind: type[Combination], nodes: Sequence[Node]) -> Node:
    flat = [
        inner for node in nodes for inner in (node.nodes if isinstance(node, kind) else (node,))
    ]
    unique = _sorted(flat)
    return unique[0] if len(unique) == 1 else kind(unique)


def _flat(node: Node) -> tuple[Node, ...]:
    """Open a parenthesis that holds nothing but picks: `(q,k),v` is `q,k,v`."""
    if isinstance(node, Clause) and not node.bounds and not node.removes:
        return node.picks
    return (node,)


def _item(node: Node) -> str:
    return str(node) if isinstance(node, Term) else f"({node})"


def _sorted(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(sorted(dict.fromkeys(nodes), key=_order))


def _order(node: Node) -> tuple[int, int, str]:
    if isinstance(node, Name):
        return 0, NAMES.index(node.name), node.scope
    return 1, 0, str(node)
