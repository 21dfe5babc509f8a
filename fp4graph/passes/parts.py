"""Which rows of a fused weight serve which part: the q, k and v of a qkv, the gate and up of both.

Each value of the linear's result is given its row's number, and the numbers are sent through the
views that follow (splits, slices, transposes), as real tensors. Where the views end, what takes the
value tells the part. So it does not matter whether parts lie one after the other (Phi-3),
interleaved by heads (GPT-NeoX, Falcon) or row by row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from fp4graph.passes.match import called
from fp4graph.passes.origins import ACTIVATIONS, ATTENTION, Flow, tensors
from fp4graph.passes.writes import VIEWS
from fp4graph.tags import Role

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Parts = dict[Role, tuple[int, ...]]

_MOVES = VIEWS | {"contiguous", "getattr"}
_SAME = {"to", "float", "type_as", "clone", "clamp", "clip", "dropout", "detach"}
_MOST = 1 << 24  # values that numbers are sent for


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
        rows = [numbers.flatten() for end, numbers in ends.items() if end in takers]
        if rows:
            found[part] = tuple(torch.cat(rows).unique().tolist())
    every = sorted(row for rows in found.values() for row in rows)
    total = node.meta["example_value"].shape[-1]
    known = set(found) == set(role.parts) and every == list(range(total))
    return found if known else {}


def _ends(node: Node) -> dict[Node, Tensor]:
    """Return the last views of a linear's result, with the numbers of the rows in them."""
    value = node.meta["example_value"]
    shape = [_hint(size) for size in value.shape]
    numbers = torch.arange(shape[-1]).expand(shape)
    if numbers.numel() > _MOST:
        return {}
    sent: dict[Node, Any] = {node: numbers}
    ends: dict[Node, Tensor] = {}
    waiting = [node]
    while waiting:
        each = waiting.pop(0)
        for user in each.users:
            name = called(user)
            if name in _SAME and user.args[:1] == (each,):
                sent[user] = sent[each]
            elif name in _MOVES and user.args[:1] == (each,):
                try:
                    sent[user] = _run(user, sent)
                except (RuntimeError, IndexError, TypeError, KeyError):
                    return {}
            else:
                if isinstance(sent[each], Tensor):
                    ends[each] = sent[each]
                continue
            waiting.append(user)
    return ends


def _run(node: Node, sent: Mapping[Node, Any]) -> Any:
    """Run a view on numbers."""

    def value(argument: Node) -> Any:
        return sent[argument] if argument in sent else _hint(argument.meta["example_value"])

    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    view: Any = node.target
    return view(*args, **kwargs)


def _hint(size: Any) -> int:
    """Return the size that a symbolic one stands for at this call."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


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
