"""The nodes around a kernel's op: constants, casts, moved dimensions, one expert's, joined rows."""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from fp4graph.graph.site import unmarked
from fp4graph.private import ConstantSource

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from fp4graph.graph.match import LinearForm

_MOST_PIECES = 3


def constant(gm: GraphModule, name: str, tensor: Tensor) -> tuple[str, Tensor, Node]:
    """Add a tensor as a buffer that AOTAutograd accepts, read at the start of the graph.

    AOTAutograd asks where each parameter and buffer of Dynamo's module came from, and asserts that
    it is told; as buffers they count among the static inputs, which CUDA graphs do not copy.

    Returns:
        what `lift` takes to make it readable in the graphs within.
    """
    gm.register_buffer(name, tensor)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(source_name=f"fp4graph.{name}")
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    with gm.graph.inserting_before(first):
        node = gm.graph.get_attr(name)
    node.meta["example_value"] = tensor
    return name, tensor, node


def cast(node: Node, dtype: torch.dtype) -> Node:
    """Cast a value, if need be."""
    value = node.meta["example_value"]
    if value.dtype == dtype:
        return node
    made = node.graph.call_method("to", (node, dtype))
    made.meta = _meta_like(node, value.to(dtype))
    return made


def move(node: Node, source: int, destination: int) -> Node:
    """Move a dimension to where a linear has it, or back."""
    if source == destination:
        return node
    moved = node.graph.call_function(torch.movedim, (node, source, destination))
    moved.meta = _meta_like(node, node.meta["example_value"].movedim(source, destination))
    return moved


def take(stack: Node, index: Any) -> Node:
    """Take one expert's tensor out of the stack of all."""
    made = stack.graph.call_function(operator.getitem, (stack, index))
    made.meta = _meta_like(stack, stack.meta["example_value"][0])
    return made


def put_among_dense(
    y: Node, rows: tuple[int, ...], index: Node, linear_node: Node, form: LinearForm
) -> Node:
    """Put the rows of a fused weight that run in FP4 among those that stay dense.

    Given:
        y = fp4graph.cpu_nvfp4(x, tiles, row_scale, None)      # of rows 6 to 8 of 9
    Result:
        y = torch.cat([linear(x, weight.narrow(0, 0, 6)), y], -1)
        # where rows are interleaved: linear(x, weight).index_copy(-1, index, y)

    Args:
        y: the FP4 result, [..., rows].
        rows: which rows of the weight those are, ascending.
        index: the same as a node, int64.
        linear_node: the dense linear.
        form: how that is spelled.
    """
    value = linear_node.meta["example_value"].movedim(form.y_dim, -1)
    cuts = [0, *(at for at, (a, b) in enumerate(pairwise(rows), 1) if b != a + 1), len(rows)]
    runs = [(rows[start], rows[end - 1] + 1) for start, end in pairwise(cuts)]
    ends = sorted({0, value.shape[-1], *(end for run in runs for end in run)})
    if len(ends) - 1 > _MOST_PIECES:
        dense = linear_node.graph.node_copy(linear_node)
        dense.meta = unmarked(linear_node)
        made = y.graph.call_method("index_copy", (move(dense, form.y_dim, -1), -1, index, y))
    else:
        x = move(form.x, form.x_dim, -1)
        pieces = []
        for start, end in pairwise(ends):
            if (start, end) in runs:
                whole = len(runs) == 1
                pieces.append(y if whole else _narrow(y, -1, rows.index(start), end - start))
            else:
                pieces.append(_dense_rows(x, form, start, end - start))
        made = y.graph.call_function(torch.cat, (pieces, -1))
    made.meta = _meta_like(y, value)
    return made


def _dense_rows(x: Node, form: LinearForm, start: int, length: int) -> Node:
    assert form.placeholder is not None
    weight = _narrow(form.placeholder, int(form.transposed), start, length)
    if form.transposed:
        weight = x.graph.call_method("t", (weight,))
    bias = None if form.bias is None else _narrow(form.bias, 0, start, length)
    return x.graph.call_function(linear, (x, weight, bias))


def _narrow(node: Node, dim: int, start: int, length: int) -> Node:
    made = node.graph.call_method("narrow", (node, dim, start, length))
    made.meta = _meta_like(node, node.meta["example_value"].narrow(dim, start, length))
    return made


def _meta_like(node: Node, value: Tensor) -> dict[str, Any]:
    return {**unmarked(node), "example_value": value}
