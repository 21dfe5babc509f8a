"""Which nodes are linears, and where their weights come from."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

_LINEAR = {torch.nn.functional.linear, torch.ops.aten.linear.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}
_ADDMM = {torch.addmm, "addmm"}
_COMPUTED = "its weight is computed in the graph"


@dataclass(frozen=True)
class LinearForm:
    """How a node spells `x @ W.T + bias`.

    Attributes:
        x: index of the input among the node's args.
        weight: the node that is passed as the weight.
        placeholder: the graph input that the weight is, or is a plain transpose of; else None.
        transposed: whether that input is stored [K, N].
        bias: node of the bias, or None.
        unsupported: why the node cannot be rewritten, or None.
    """

    x: int
    weight: Node
    placeholder: Node | None
    transposed: bool
    bias: Node | None
    unsupported: str | None = None


def match_linear(node: Node) -> LinearForm | None:
    """Recognise `F.linear`, GPT-2's `addmm(bias, x, W)` and Falcon's `matmul(x, W.T)`."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        if not isinstance(weight, Node) or not node.args:
            return None
        return _form(0, weight, bias, stored_NK=True)
    if node.target in _MATMUL and len(node.args) == 2 and isinstance(node.args[1], Node):
        return _form(0, node.args[1], None, stored_NK=False)
    if node.target in _ADDMM and len(node.args) == 3 and isinstance(node.args[2], Node):
        form = _form(1, node.args[2], node.args[0], stored_NK=False)
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
            return replace(form, unsupported="it is an addmm with alpha or beta")
        return form
    return None


def _form(x: int, weight: Node, bias: object, *, stored_NK: bool) -> LinearForm:
    placeholder, flipped = _trace_weight(weight)
    return LinearForm(
        x=x,
        weight=weight,
        placeholder=placeholder,
        transposed=flipped == stored_NK,
        bias=bias if isinstance(bias, Node) else None,
        unsupported=_COMPUTED if placeholder is None else None,
    )


def _trace_weight(node: Node) -> tuple[Node | None, bool]:
    """Follow transposes up to a graph input: (the input or None, whether it was transposed)."""
    flipped = False
    while node.op != "placeholder":
        if not _is_transpose(node):
            return None, flipped
        node, flipped = node.args[0], not flipped  # type: ignore[assignment]
    return node, flipped


def _is_transpose(node: Node) -> bool:
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target in ("t", torch.t):
        return True
    return node.target in ("transpose", torch.transpose) and set(node.args[1:]) in (
        {0, 1},
        {-1, -2},
    )
