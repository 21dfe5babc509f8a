"""Selectors for sets of linears that are known by role and block."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Iterable

Cell = tuple[str, int]
"""A role and a block."""
_ORDER = {str(role): place for place, role in enumerate(Role)}
_CELL = re.compile(r"(\w+),blocks=(\d+)")


def cell_of(selector: str) -> Cell | None:
    """Return the role and block of a selector such as `q,blocks=3`; None of another."""
    found = _CELL.fullmatch(selector)
    return (found[1], int(found[2])) if found else None


def kind_of(selector: str) -> str:
    """Return what a selector is of: `role`, `block`, `role,block`, or `other` for any other."""
    if cell_of(selector):
        return "role,block"
    if re.fullmatch(r"blocks=\d+", selector):
        return "block"
    return "role" if selector in _ORDER else "other"


def shortest(chosen: Iterable[Cell], every: Iterable[Cell]) -> str:
    """Return a selector for some of a model's linears: what they are, or all but the others.

    >>> every = [(role, block) for role in ("q", "v") for block in range(4)]
    >>> shortest([("v", 1), ("v", 2), ("v", 3)], every)
    'v,blocks=1..3'
    >>> shortest([cell for cell in every if cell != ("q", 0)], every)
    'all,!(q,blocks=0)'
    """
    cells = set(every)
    inside = set(chosen)
    if inside == cells:
        return "all"
    within = _clauses(inside, cells)
    without = _clauses(cells - inside, cells)
    if not within:
        return "none"
    if len(within) <= len(without):
        return " | ".join(within)
    return ",".join(["all", *(f"!({clause})" for clause in without)])


def _clauses(cells: set[Cell], every: set[Cell]) -> list[str]:
    """Return a clause for each role and run of blocks; roles with the same blocks share one."""
    roles: dict[str, list[int]] = defaultdict(list)
    for role, block in sorted(cells, key=lambda cell: (_ORDER.get(cell[0], len(_ORDER)), cell)):
        roles[role].append(block)
    by_blocks: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for role, blocks in roles.items():
        whole = sum(each == role for each, _ in every) == len(blocks)
        by_blocks[() if whole else tuple(_runs(blocks))].append(role)
    clauses = []
    for runs, names in by_blocks.items():
        roles_text = ",".join(names)
        clauses += [f"{roles_text},blocks={run}" for run in runs] or [roles_text]
    return clauses


def _runs(blocks: list[int]) -> list[str]:
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return [f"{a}" if a == b else f"{a}..{b}" for a, b in zip(starts, ends, strict=True)]
