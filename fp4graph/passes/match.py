"""Which nodes are linears, and where their weights come from."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

_LINEAR = {torch.nn.functional.linear, torch.ops.aten.linear.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}
_ADDMM = {torch.addmm, "addmm"}

# the arguments of each by all their names, in order
_LINEAR_ARGUMENTS = (("input",), ("weight",), ("bias",))
_MATMUL_ARGUMENTS = (("input", "self"), ("other", "mat2", "tensor2"))
_ADDMM_ARGUMENTS = (("input", "self"), ("mat1",), ("mat2",))

_GET_DATA = torch._C._autograd._get_data_attr  # type: ignore[attr-defined]  # what Dynamo makes of `weight.data`
_COPIES = {
    *("detach", "contiguous", "clone", "alias", "to", "type", "type_as"),
    *("float", "half", "bfloat16", "double"),
}
_COMPUTED = "its weight is computed in the graph"
_FROZEN = (
    "its weight is a constant of the graph, as torch._inductor.config.freezing makes it: "
    "turn freezing off, FP4 weights are constants anyway"
)


@dataclass(frozen=True)
class LinearForm:
    """How a node spells `x @ W.T + bias`.

    Attributes:
        x: the input.
        weight: the node that is passed as the weight.
        placeholder: the graph input whose values the weight has, plain or transposed; else None.
        transposed: whether that input is stored [K, N].
        bias: the bias, or None.
        unsupported: why the node cannot be rewritten, or None.
    """

    x: Node
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
        return _form(node, _bind(node, _LINEAR_ARGUMENTS), stored_NK=True)
    if node.target in _MATMUL:
        return _form(node, (*_bind(node, _MATMUL_ARGUMENTS), None), stored_NK=False)
    if node.target in _ADDMM:
        bias, x, weight = _bind(node, _ADDMM_ARGUMENTS)
        return _form(node, (x, weight, bias), stored_NK=False)
    return None


def called(node: Node) -> str:
    """Return the plain name of what a node calls."""
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", None) or str(node.target).rpartition(".")[2]
    return str(name).partition(".")[0]  # of an overload, `add.Tensor`, the op alone


def is_linear(node: Node) -> bool:
    """Whether the node is a linear by its own name, whatever its weight is."""
    return node.target in _LINEAR


def _bind(node: Node, names: tuple[tuple[str, ...], ...]) -> tuple[object, ...]:
    """Return the arguments in order, however they were passed; None for what is not there."""
    if len(node.args) > len(names):
        return (None,) * len(names)
    by_name = (
        next((node.kwargs[name] for name in spellings if name in node.kwargs), None)
        for spellings in names[len(node.args) :]
    )
    return (*node.args, *by_name)


def _form(node: Node, arguments: tuple[object, ...], *, stored_NK: bool) -> LinearForm | None:
    x, weight, bias = arguments
    if not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    placeholder, flipped = source_of(weight)
    return LinearForm(
        x=x,
        weight=weight,
        placeholder=placeholder,
        transposed=flipped == stored_NK,
        bias=bias if isinstance(bias, Node) else None,
        unsupported=_unsupported(node, weight, placeholder),
    )


def _unsupported(node: Node, weight: Node, placeholder: Node | None) -> str | None:
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "it is an addmm with alpha or beta"
    if node.kwargs.get("out") is not None:
        return "it writes its result to an existing tensor (out=)"
    if placeholder is None:
        return _FROZEN if _follow(weight)[0].op == "get_attr" else _COMPUTED
    return None


def source_of(node: Node) -> tuple[Node | None, bool]:
    """Follow transposes and plain copies up to a graph input: (that or None, was it transposed)."""
    source, flipped = _follow(node)
    return (source if source.op == "placeholder" else None), flipped


def _follow(node: Node) -> tuple[Node, bool]:
    flipped = False
    while is_transpose(node) or is_copy(node):
        flipped ^= is_transpose(node)
        node = node.args[0]  # type: ignore[assignment]
    return node, flipped


def is_transpose(node: Node) -> bool:
    """Whether the node swaps the two dimensions of a matrix."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.target in ("t", torch.t):
        return True
    return node.target in ("transpose", torch.transpose, "swapaxes", "permute") and set(
        node.args[1:]
    ) in ({0, 1}, {-1, -2})


def is_copy(node: Node) -> bool:
    """Whether the node's value is its first argument's: `.data`, `.detach()`, `.to(same dtype)`."""
    if not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is getattr:
        return node.args[1] == "data"
    if node.target in (_GET_DATA, torch.detach, torch.clone):
        return True
    if node.op != "call_method" or node.target not in _COPIES:
        return False
    before, after = (each.meta.get("example_value") for each in (node.args[0], node))
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and (before.dtype, before.device) == (after.dtype, after.device)
    )
