"""Which rows of a fused weight serve which part: the q, k and v of a qkv, the gate and up of both.

Each value of the linear's result is given its row's number, and the numbers are sent through the
views that follow (splits, slices, transposes). Where the views end, what takes the value tells the
part. Parts may lie one after the other (Phi-3), interleaved by heads (GPT-NeoX, Falcon) or row by
row. A row's number is the same for every token, so the number of tokens does not matter either:
see `numbering.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fp4graph.graph.flow import ACTIVATIONS, ATTENTION, Flow, tensors
from fp4graph.graph.match import called
from fp4graph.graph.numbering import Numbering, sizes_of, view
from fp4graph.graph.writes import VIEWS
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Collection

Parts = dict[Role, tuple[int, ...]]

_MOVES = VIEWS | {"contiguous", "getattr"}
_SAME = {"to", "float", "type_as", "clone", "clamp", "clip", "dropout", "detach"}


def parts_of(node: Node, role: Role, flow: Flow) -> Parts:
    """Return the rows of each part of a fused linear, ascending; empty where that is not known.

    Args:
        node: the linear.
        role: `qkv`, `kv` or `gate_up`.
        flow: of the graph.
    """
    ends = _ends(node)
    asked = {Role.GATE_UP: _gates}.get(role, _arguments)(node, role, flow)
    found: Parts = {}
    for part, takers in asked.items():
        rows = [numbering.rows for end, numbering in ends.items() if end in takers]
        if rows:
            found[part] = tuple(torch.cat(rows).unique().tolist())
    every = sorted(row for rows in found.values() for row in rows)
    total = node.meta["example_value"].shape[-1]
    known = set(found) == set(role.parts) and every == list(range(total))
    return found if known else {}


def _ends(node: Node) -> dict[Node, Numbering]:
    """Return the last views of a linear's result, with the numbers of the rows in them."""
    sizes = sizes_of(node)
    if sizes is None:
        return {}
    sent: dict[Node, Numbering | tuple[Numbering, ...]] = {node: Numbering.of(sizes)}
    ends: dict[Node, Numbering] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop(0)
        before = sent[each]
        for user in each.users:
            name = called(user)
            if name in _SAME and user.args[:1] == (each,):
                sent[user] = before
            elif name in _MOVES and user.args[:1] == (each,):
                after = view(user, before)
                if after is None:
                    return {}
                sent[user] = after
            else:
                if isinstance(before, Numbering):
                    ends[each] = before
                continue
            waiting.append(user)
    return ends


def _arguments(node: Node, role: Role, flow: Flow) -> dict[Role, Collection[Node]]:
    """Return by part the values that reach attention's argument of that name."""
    for _, arguments in flow.attentions:
        reached = [flow.linears_of(argument) for argument in arguments]
        if any(node in linears for linears in reached):
            behind = {
                Role(letter): _behind(argument, flow)
                for letter, argument in zip("qkv", arguments, strict=True)
            }
            return {part: behind[part] for part in role.parts}
    return {}


def _gates(node: Node, role: Role, flow: Flow) -> dict[Role, Collection[Node]]:
    """Return what passes an activation on its way into down, and what does not."""
    for x in flow.linears.values():
        if node not in flow.linears_of(x):
            continue
        every = _behind(x, flow)
        activated = {
            value
            for each in every
            if called(each) in ACTIVATIONS
            for value in _behind(each, flow) - {each}
        }
        return {Role.GATE: activated, Role.UP: every - activated}
    return {}


def _behind(node: Node, flow: Flow) -> set[Node]:
    """Return a value and all that it is made of, up to linears and attention."""
    found, waiting = set[Node](), [node]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            ends = each in flow.linears or called(each) in ATTENTION
            waiting += [] if ends else tensors(each)
    return found
