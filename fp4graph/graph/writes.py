"""Which nodes write to a tensor in place, and what they reach."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from fp4graph.graph.match import called
from fp4graph.graph.weight_source import is_copy, is_transpose

if TYPE_CHECKING:
    from torch.fx import Graph

_IN_PLACE_OPERATORS = {
    *("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
}
VIEWS = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "narrow"),
    *("select", "index_select", "unbind", "getitem", "diagonal", "as_strided", "view_as"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "expand_as", "ravel"),
    *("t", "transpose", "permute", "swapaxes", "swapdims", "movedim", "numpy_T", "mT"),
}
"""Names of what returns a part of a tensor's memory, or may."""


def writes_in_place(node: Node) -> bool:
    """Whether a node may change a tensor that exists already.

    By Python's spelling (`mul_`, `x += y`, `x[i] = y`, `out=`), by an op's schema, and for a
    higher-order op always, for its body may.
    """
    if node.op == "call_method":
        return _named_in_place(str(node.target)) or node.target == "__setitem__"
    if node.op != "call_function":
        return False
    if isinstance(node.target, HigherOrderOperator):
        return True
    if isinstance(node.target, OpOverload):
        return bool(node.target._schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    return (
        _named_in_place(name)
        or node.kwargs.get("out") is not None
        or bool(node.kwargs.get("inplace"))
    )


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def written(graph: Graph) -> set[Node]:
    """Return the nodes whose values the graph overwrites after they were made, views included."""
    found: set[Node] = set()
    for node in graph.nodes:
        if not writes_in_place(node) or isinstance(node.target, HigherOrderOperator):
            continue
        targets = [node.args[0] if node.args else None, node.kwargs.get("out")]
        for target in targets:
            while isinstance(target, Node) and target not in found:
                found.add(target)
                target = target.args[0] if is_view(target) else None
    return found


def is_view(node: Node) -> bool:
    """Whether a node's result shares the memory of its first input."""
    if not node.args:
        return False
    name = called(node)
    return is_transpose(node) or is_copy(node) or name in VIEWS or _named_in_place(name)
