"""Selector text to `Selector`: which linears of a model run in FP4.

>>> str(parse("v, q | (blocks>4 , mlp)"))
'mlp,blocks>4 | q,v'
>>> parse("attn,blocks>4") == parse("blocks>4, attn")
True
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from lark import (
    Lark,
    Token,
    Transformer,
    UnexpectedCharacters,
    UnexpectedInput,
    UnexpectedToken,
    v_args,
)
from lark.exceptions import VisitError

from fp4graph.errors import SelectorError
from fp4graph.linears.selector_ast import (
    EXPERT_LINEARS,
    NAMES,
    SCOPES,
    Blocks,
    Name,
    Node,
    Not,
    Path,
    Size,
    Term,
    clause,
    meet,
    union,
)
from fp4graph.linears.stacks import STACKS
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lark.tree import Meta

    from fp4graph.linears.tags import LinearTag

__all__ = ["Selector", "parse"]

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9}
_A_TERM = "a role, a group, `blocks`, `size`, `path:`, `!` or `(`"
_EXPECTED = {  # terminals of the grammar, in the reader's words
    "NAME": _A_TERM,
    "COMPARE": "`>`, `>=`, `<`, `<=`",
    "INT": "a whole number",
    "SIZE": "a number such as 500K, 1M or 7B",
    "EQUAL": "`=`",
    "PERCENT": "`%`",
    "RPAR": "`)`",
    "COLON": "`:`",
    "COMMA": "`,`",
    "VBAR": "`|`",
    "AMPERSAND": "`&`",
    "__DOT_DOT_0": "`..`",
}


@dataclass(frozen=True)
class Selector:
    """A set of linears, described; equal selectors have equal canonical text, `str(selector)`.

    Attributes:
        text: what the user wrote, for messages.
        root: the syntax tree, normalised.

    Raises:
        SelectorError: the text cannot be parsed; with the column, and what was expected there or
            which names exist.
    """

    text: str = field(compare=False)
    root: Node = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", _parse(self.text))

    def __str__(self) -> str:
        return str(self.root)

    @property
    def counts_from_end(self) -> bool:
        """Whether a term has a negative block index."""
        return any(term.counts_from_end for term in self.root.terms())

    def matches(self, tag: LinearTag) -> bool:
        """Tell whether `tag` is selected, whole.

        Raises:
            SelectorError: see `picks`, or only some parts of a fused weight are selected.
        """
        picked = self.picks(tag)
        if picked and len(picked) < len(tag.parts):
            scope = "expert:" if tag.role is Role.EXPERT else ""
            parts = ",".join(scope + part for part in tag.parts)
            raise SelectorError(
                self.text,
                f"{','.join(picked)} is only a part of the fused {tag.fqn}: "
                f"use {scope}{tag.expert or tag.role} or {parts}",
                self._column_of(tag),
            )
        return bool(picked)

    def picks(self, tag: LinearTag) -> tuple[Role, ...]:
        """Return what of `tag` is selected: parts of a fused weight, all, or none.

        Raises:
            SelectorError: a negative block index meets a tag that does not know the number of
                blocks.
        """
        if tag.num_blocks is None and self.counts_from_end:
            problem = "a negative block index needs the number of blocks: pass model= to backend()"
            raise SelectorError(self.text, problem)
        return tuple(part for part in tag.parts if self.root.accepts(tag, part))

    def _column_of(self, tag: LinearTag) -> int | None:
        """Return where a part of the tag's role is named."""
        named = (term for term in self.root.terms() if isinstance(term, Name))
        return next((term.column for term in named if term.name in tag.parts), None)

    def check(self, tags: Iterable[LinearTag]) -> None:
        """Check that the selector fits a model.

        Args:
            tags: every linear of the model.

        Raises:
            SelectorError: a term matches no linear, or the whole selects none (`none` may).
        """
        tags = list(tags)
        for term in self.root.terms():
            if not term.may_be_empty and not any(
                term.accepts(tag, part) for tag in tags for part in tag.parts
            ):
                raise SelectorError(
                    self.text, f"`{term}` matches nothing: {describe(tags)}", term.column
                )
        if str(self) != "none" and not any(self.picks(tag) for tag in tags):
            problem = f"every term matches, but together they select nothing: {describe(tags)}"
            raise SelectorError(self.text, problem)


def describe(tags: Sequence[LinearTag]) -> str:
    """Say in one line which roles and blocks a model has."""
    if not tags:
        return "the graph has no linears"
    hint = "; `other` is what no rule knows" if any(t.role is Role.OTHER for t in tags) else ""
    stacks = sorted({tag.stack for tag in tags if tag.block is not None}, key=STACKS.index)
    if len(stacks) < 2:
        return f"the model has {_describe(tags)}{hint}"
    each = (f"{name}: ({_describe([t for t in tags if t.stack == name])})" for name in stacks)
    return f"this model has stacks {', '.join(each)}{hint}"


def _describe(tags: Sequence[LinearTag]) -> str:
    roles = ", ".join(sorted({str(tag.role) for tag in tags}))
    blocks = sorted({tag.block for tag in tags if tag.block is not None})
    return f"{roles}; " + (f"blocks {blocks[0]}..{blocks[-1]}" if blocks else "no blocks")


@cache
def parse(text: str) -> Selector:
    """Return `Selector(text)`."""
    return Selector(text)


def _parse(text: str) -> Node:
    try:
        return _Build(text).transform(_parser().parse(text))
    except VisitError as error:
        raise error.orig_exc from None
    except UnexpectedInput as error:
        raise SelectorError(text, *_explain(text, error)) from None


@cache
def _parser() -> Lark:
    grammar = files("fp4graph.linears").joinpath("selector.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start="selector", propagate_positions=True)


def _explain(text: str, error: UnexpectedInput) -> tuple[str, int]:
    if not text.strip():
        return f"empty; expected {_A_TERM} (`none` selects nothing)", 1
    if isinstance(error, UnexpectedToken):
        at_end = error.token.type == "$END"
        found = "the text ends" if at_end else f"unexpected {str(error.token)!r}"
        column = len(text.rstrip()) + 1 if at_end else error.column
        wanted = error.accepts or error.expected
    else:
        assert isinstance(error, UnexpectedCharacters)
        found, column = f"unexpected {text[error.column - 1]!r}", error.column
        wanted = error.allowed
    open_ended = {name for name in wanted if name != "RPAR" or "(" in text}
    expected = sorted(_EXPECTED[name] for name in open_ended if name in _EXPECTED) or ["the end"]
    return f"{found}; expected {' or '.join(expected)}", column


@v_args(meta=True)
class _Build(Transformer[Token, Node]):
    """Parse tree to syntax tree."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def name(self, meta: Meta, children: list[Token]) -> Term:
        return Name(self._known(children[0], "names", NAMES), column=meta.column)

    def scoped(self, meta: Meta, children: list[Token]) -> Term:
        scope = self._known(children[0], "prefixes", SCOPES)
        names = EXPERT_LINEARS if scope == "expert" else NAMES
        return Name(self._known(children[1], "names", names), scope, column=meta.column)

    def _known(self, token: Token, kind: str, known: Sequence[str]) -> str:
        if token in known:
            return str(token)
        close = difflib.get_close_matches(token.lower(), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        one = {"names": "name", "prefixes": "prefix"}[kind]
        problem = f"unknown {one} {str(token)!r}{hint}; {kind} are {', '.join(known)}"
        raise SelectorError(self.text, problem, token.column)

    def path(self, meta: Meta, children: list[Token]) -> Term:
        pattern = children[0].removeprefix("path:")
        if not pattern:
            raise SelectorError(self.text, "`path:` needs a pattern: path:*.mlp.*", meta.column)
        return Path(pattern, column=meta.column)

    def blocks(self, meta: Meta, children: list[Token]) -> Term:
        return Blocks(str(children[0]), (int(children[1]),), column=meta.column)

    def block_range(self, meta: Meta, children: list[Token]) -> Term:
        low, high = int(children[0]), int(children[-1])
        if low > high and (low < 0) == (high < 0):
            raise SelectorError(self.text, f"the range {low}..{high} is empty", meta.column)
        return Blocks("=", (low, high), column=meta.column)

    def block_modulo(self, meta: Meta, children: list[Token]) -> Term:
        divisor, rest = map(int, children)
        if not 0 <= rest < divisor:
            problem = f"blocks%{divisor}={rest} never holds: expected 0 <= rest < divisor"
            raise SelectorError(self.text, problem, meta.column)
        return Blocks("%", (divisor, rest), column=meta.column)

    def size(self, meta: Meta, children: list[Token]) -> Term:
        compare, number = children
        value = float(number.rstrip("KMB")) * _SUFFIXES.get(number[-1], 1)
        return Size(str(compare), round(value), column=meta.column)

    def negated(self, meta: Meta, children: list[Node]) -> Node:
        return Not(children[0])

    def clause(self, meta: Meta, children: list[Node]) -> Node:
        return clause(children)

    def conj(self, meta: Meta, children: list[Node]) -> Node:
        return meet(children)

    def selector(self, meta: Meta, children: list[Node]) -> Node:
        return union(children)
