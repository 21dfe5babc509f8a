"""Which nodes do more than make their value, and where in a graph such an effect is under way."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from fp4graph.graph.match import called
from fp4graph.graph.writes import writes_in_place
from fp4graph.private import NN_FUNCTIONS, SET_GRAD_ENABLED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch.fx import Node

_BEGINS = re.compile(r"increment|enter|push")
_ENDS = re.compile(r"decrement|exit|pop")
_PLAIN = (getattr, operator.getitem)


def is_pure(node: Node) -> bool:
    """Whether a node provably makes a value and does nothing else.

    That is what torch's own op of its name says: one that writes to none of its arguments and
    draws no random numbers. Whatever is not known, such as vmap's nesting, is taken to do more.
    """
    if node.op == "get_attr":
        return True
    if node.op not in ("call_function", "call_method") or writes_in_place(node):
        return False
    target: Any = node.target
    if isinstance(target, OpOverload):
        return torch.Tag.nondeterministic_seeded not in target.tags
    if target in _PLAIN or getattr(target, "__module__", None) in ("_operator", "math"):
        return True
    name = called(node)
    homes = (torch, torch.nn.functional, NN_FUNCTIONS, torch.Tensor)
    own = node.op == "call_method" or any(getattr(home, name, None) is target for home in homes)
    packet = getattr(torch.ops.aten, name, None) if own else target
    if not isinstance(packet, OpOverloadPacket):
        return False
    overloads = [getattr(packet, each) for each in packet.overloads()]
    random = any(torch.Tag.nondeterministic_seeded in each.tags for each in overloads)
    return not random and any(not each._schema.is_mutable for each in overloads)


def under_way(nodes: Sequence[Node]) -> Iterator[bool]:
    """Say for each place before a node whether an effect has begun that has yet to end.

    Between the two, vmap's levels, autocast or the gradient mode are not the caller's: a graph that
    is run from there, or only up to there, computes something else. The last gradient mode that a
    graph sets is the caller's own.
    """
    modes = [node.args[0] for node in nodes if node.target is SET_GRAD_ENABLED]
    usual = mode = modes[-1] if modes else None
    depth = 0
    for node in nodes:
        yield depth > 0 or mode != usual
        if node.target is SET_GRAD_ENABLED:
            mode = node.args[0]
        elif node.op == "call_function" and not is_pure(node):
            depth += bool(_BEGINS.search(called(node))) - bool(_ENDS.search(called(node)))
