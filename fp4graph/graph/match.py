"""Which nodes are linears, and where their weights come from."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import Node

from fp4graph.graph.weight_source import entry_of, follow, source_of
from fp4graph.kernels.grouped import GROUPED

_LINEAR = {torch.nn.functional.linear, torch.ops.aten.linear.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, "matmul", "mm"}
_ADDMM = {torch.addmm, "addmm"}
_BMM = {torch.bmm, "bmm"}

# the arguments of each by all their names, in order
_LINEAR_ARGUMENTS = (("input",), ("weight",), ("bias",))
_MATMUL_ARGUMENTS = (("input", "self"), ("other", "mat2", "tensor2"))
_ADDMM_ARGUMENTS = (("input", "self"), ("mat1",), ("mat2",))
_GROUPED_ARGUMENTS = (("input", "mat_a", "self"), ("weight", "mat_b", "mat2"))

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
        offs: of experts, the node that says where each one's rows of x end, one after the other.
        index: of experts, which one computes all of x: a number or the node that says so.
        batched: of experts, whether x holds as many rows for each, [E, M, K].
        x_dim: which dimension of x is K; it is the last but for `W @ x` and einsum.
        y_dim: which dimension of the result is N.
        unsupported: why the node cannot be rewritten, or None.
    """

    x: Node
    weight: Node
    placeholder: Node | None
    transposed: bool
    bias: Node | None
    offs: Node | None = None
    index: object = None
    batched: bool = False
    x_dim: int = -1
    y_dim: int = -1
    unsupported: str | None = None

    @property
    def stacked(self) -> bool:
        """Whether the weight is a stack of experts, and not a matrix."""
        return self.offs is not None or self.index is not None or self.batched


def match_linear(node: Node) -> LinearForm | None:
    """Recognise a linear.

    `F.linear`, GPT-2's `addmm(bias, x, W)`, Falcon's `matmul(x, W.T)`, Mamba's `W @ x`, an einsum
    of x and a matrix; of experts `grouped_mm(x, W, offs)`, `bmm(x, W)`, and any of the first three
    on `W[expert]`.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _LINEAR:
        return _form(node, _bind(node, _LINEAR_ARGUMENTS), stored_NK=True)
    if node.target in _MATMUL:
        first, second = _bind(node, _MATMUL_ARGUMENTS)
        if _is_matrix(first) and not _is_matrix(second):
            form = _form(node, (second, first, None), stored_NK=True)
            is_vector = form is not None and form.x.meta["example_value"].ndim == 1
            return form if form is None or is_vector else replace(form, x_dim=-2, y_dim=-2)
        return _form(node, (first, second, None), stored_NK=False)
    if called(node) == "einsum":
        return _einsum(node)
    if node.target in _ADDMM:
        bias, x, weight = _bind(node, _ADDMM_ARGUMENTS)
        return _form(node, (x, weight, bias), stored_NK=False)
    if node.target in _BMM:
        form = _form(node, (*_bind(node, _MATMUL_ARGUMENTS), None), stored_NK=False)
        return form and replace(form, batched=True)
    if called(node) in GROUPED:
        return _grouped(node)
    return None


def _einsum(node: Node) -> LinearForm | None:
    """Recognise what sums over one dimension of x and of a matrix, and keeps all others."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    found = re.fullmatch(r"(\w+),(\w+)->(\w+)", str(equation).replace(" ", ""))
    if found is None or len(operands) != 2:
        return None
    first, second, out = found.groups()
    x, weight = operands
    if _is_matrix(x):
        x, weight, first, second = weight, x, second, first
    summed, kept = set(first) & set(second), set(second) - set(first)
    repeats = any(len(set(each)) < len(each) for each in (first, second, out))
    if not _is_matrix(weight) or len(summed) != 1 or len(kept) != 1 or repeats:
        return None
    k, n = summed.pop(), kept.pop()
    if n not in out or out.replace(n, "") != first.replace(k, ""):
        return None
    form = _form(node, (x, weight, None), stored_NK=second == n + k)
    return form and replace(form, x_dim=first.index(k), y_dim=out.index(n))


def _is_matrix(node: object) -> bool:
    """Whether a node is a parameter of two dimensions, plain or transposed."""
    source = source_of(node)[0] if isinstance(node, Node) else None
    value = None if source is None else source.meta.get("example_value")
    return isinstance(value, nn.Parameter) and value.ndim == 2


def _grouped(node: Node) -> LinearForm | None:
    offs = node.kwargs.get("offs", next(iter(node.args[2:]), None))
    if not isinstance(offs, Node):
        return None
    matrices = _bind(node, _GROUPED_ARGUMENTS, rest=len(node.args[2:]))
    form = _form(node, (*matrices, None), stored_NK=False)
    extra = any(node.kwargs.get(name) is not None for name in ("bias", "out_dtype"))
    if form is None or not extra:
        return form and replace(form, offs=offs)
    return replace(form, offs=offs, unsupported="it is a grouped_mm with a bias or a dtype")


def called(node: Node) -> str:
    """Return the plain name of what a node calls."""
    if isinstance(node.target, str):
        return node.target
    name = getattr(node.target, "__name__", None) or str(node.target).rpartition(".")[2]
    return str(name).partition(".")[0]  # of an overload, `add.Tensor`, the op alone


def is_linear(node: Node) -> bool:
    """Whether the node is a linear by its own name, whatever its weight is."""
    return node.target in _LINEAR or called(node) in GROUPED


def _bind(node: Node, names: tuple[tuple[str, ...], ...], rest: int = 0) -> tuple[object, ...]:
    """Return the arguments in order, however they were passed; None for what is not there.

    Args:
        node: the call.
        names: of each argument all names that it goes by.
        rest: how many more positional arguments there are.
    """
    if len(node.args) > len(names) + rest:
        return (None,) * len(names)
    by_name = (
        next((node.kwargs[name] for name in spellings if name in node.kwargs), None)
        for spellings in names[len(node.args) :]
    )
    return (*node.args[: len(names)], *by_name)


def _form(node: Node, arguments: tuple[object, ...], *, stored_NK: bool) -> LinearForm | None:
    x, weight, bias = arguments
    if not isinstance(x, Node) or not isinstance(weight, Node):
        return None
    source, flipped = follow(weight)
    entry, index = entry_of(source) or (source, None)
    placeholder, flipped_before = source_of(entry)
    flipped ^= flipped_before
    return LinearForm(
        x=x,
        weight=weight,
        placeholder=placeholder,
        transposed=flipped == stored_NK,
        bias=bias if isinstance(bias, Node) else None,
        index=index,
        unsupported=_unsupported(node, weight, placeholder),
    )


def _unsupported(node: Node, weight: Node, placeholder: Node | None) -> str | None:
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        return "it is an addmm with alpha or beta"
    if node.kwargs.get("out") is not None:
        return "it writes its result to an existing tensor (out=)"
    if placeholder is None:
        return _FROZEN if follow(weight)[0].op == "get_attr" else _COMPUTED
    return None
