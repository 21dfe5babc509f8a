"""Where the weight of a linear comes from: a graph input, through transposes, copies, an index."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from fp4graph.private import GET_DATA, attribute_of

_COPIES = {
    *("detach", "contiguous", "clone", "alias", "to", "type", "type_as"),
    *("float", "half", "bfloat16", "double"),
}
_SWAPS = {"transpose", torch.transpose, "swapaxes", torch.swapaxes, "swapdims", torch.swapdims}


def source_of(node: Node) -> tuple[Node | None, bool]:
    """Follow transposes and plain copies up to a graph input: (that or None, was it transposed)."""
    source, flipped = follow(node)
    return (source if source.op == "placeholder" else None), flipped


def follow(node: Node) -> tuple[Node, bool]:
    """Follow transposes and plain copies as far as they go: (where they start, was it flipped)."""
    flipped = False
    while is_transpose(node) or is_copy(node):
        flipped ^= is_transpose(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, flipped


def entry_of(node: Node) -> tuple[Node, object] | None:
    """Return (stack, index) where a node takes one matrix of a stack of them, by a single index."""
    if node.target is operator.getitem or node.target in ("select", torch.select):
        stack, *place = node.args
        if node.target is not operator.getitem:
            place = place[1:] if place[:1] == [0] else []
        if len(place) == 1 and isinstance(stack, Node) and _ndim(stack) == 3:
            return (stack, place[0]) if _is_single(place[0]) else None
    return None


def _is_single(index: object) -> bool:
    if isinstance(index, Node):
        value = index.meta.get("example_value")
        if isinstance(value, torch.Tensor):
            return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
        return isinstance(value, int | torch.SymInt)
    return isinstance(index, int)


def is_transpose(node: Node) -> bool:
    """Whether the node swaps the two dimensions of a matrix, or of each matrix of a stack."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    ndim = _ndim(node.args[0])
    attribute = attribute_of(node)
    if attribute is not None:
        return attribute == "mT" or (attribute == "T" and ndim == 2)
    if node.target in ("t", torch.t):
        return True
    given = node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    if not all(isinstance(dim, int) for dim in dims):
        return False
    places = [dim % ndim for dim in dims]  # type: ignore[operator]
    if node.target in _SWAPS:
        return sorted(places) == [ndim - 2, ndim - 1]
    if node.target in ("permute", torch.permute):
        return places == [*range(ndim - 2), ndim - 1, ndim - 2]
    return False


def _ndim(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.ndim if isinstance(value, torch.Tensor) else 2


def is_copy(node: Node) -> bool:
    """Whether the node's value is its first argument's: `.data`, `.detach()`, `.to(same dtype)`."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if attribute_of(node) == "data":
        return True
    if node.target in (GET_DATA, torch.detach, torch.clone):
        return True
    if node.op != "call_method" or node.target not in _COPIES:
        return False
    before, after = (each.meta.get("example_value") for each in (node.args[0], node))
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and (before.dtype, before.device) == (after.dtype, after.device)
    )
