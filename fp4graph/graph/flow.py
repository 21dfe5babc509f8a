"""Where every value of a graph comes from: which linears' results it is made of.

The walk back goes through views, norms, rotary embeddings and the like, and notes whether a value
passed an activation or was cut into parts on the way. It ends at linears, attention, softmax,
products of two activations, inputs, and where unlike values are added: the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.fx import Node

from fp4graph.graph.match import called, match_linear
from fp4graph.graph.site import site_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.fx import Graph

    from fp4graph.graph.regions import Region

ACTIVATIONS = {
    *("silu", "gelu", "relu", "relu6", "sigmoid", "tanh", "elu", "celu", "selu", "softplus"),
    *("hardswish", "hardsigmoid", "mish", "leaky_relu", "logsigmoid", "erf", "relu_", "silu_"),
}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "causal_conv1d_fn"}
_CUTS = {"chunk", "split", "tensor_split", "split_with_sizes", "narrow", "unbind", "getitem"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm"}
ATTENTION = {"scaled_dot_product_attention", "flex_attention"}
_QKV = ("query", "key", "value")
SOFTMAX = {"softmax", "_softmax"}
_SUMS = {"add", "iadd", "add_", "sub", "addcmul"}
TOP = {"topk", "argmax", "sort", "argsort"}
_ENDS = SOFTMAX | TOP | _CONVOLUTIONS | {"embedding"}


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Attributes:
        node: a linear, or where the walk ended otherwise.
        activated: whether it passed an activation since.
        cut: whether only a part of it is left.
    """

    node: Node
    activated: bool = False
    cut: bool = False


Origins = frozenset[Origin]
_NOTHING: Origins = frozenset()


class Flow:
    """The origins of every value of a graph."""

    def __init__(
        self, graph: Graph, linears: Mapping[Node, Node], parameters: Collection[Node]
    ) -> None:
        self.linears = linears
        self._parameters = parameters
        self.nodes = list(graph.nodes)
        self.attentions: list[tuple[Node, tuple[Node, Node, Node]]] = []
        self._results: set[Node] = set()
        self._origins: dict[Node, Origins] = {}
        for node in self.nodes:  # in order of execution, so what is asked for is there
            self._origins[node] = self._of(node)

    def __getitem__(self, node: Node) -> Origins:
        return self._origins[node]

    def is_parameter(self, node: Node) -> bool:
        """Whether a placeholder is a parameter or a buffer of the model."""
        return node in self._parameters

    def linears_of(self, node: Node) -> dict[Node, list[Origin]]:
        """Group the origins that are linears."""
        found: dict[Node, list[Origin]] = {}
        for origin in self._origins[node]:
            if origin.node in self.linears:
                found.setdefault(origin.node, []).append(origin)
        return found

    def takes_attention(self, node: Node) -> bool:
        """Whether a value is made of attention's result."""
        return any(origin.node in self._results for origin in self._origins[node])

    def is_plain(self, node: Node) -> bool:
        """Whether a value is made of linears alone."""
        origins = self._origins[node]
        return bool(origins) and all(origin.node in self.linears for origin in origins)

    def _of(self, node: Node) -> Origins:
        if node in self.linears or self._starts(node):
            return frozenset({Origin(node)})
        if node.op not in ("call_function", "call_method"):
            return _NOTHING
        name, inputs = called(node), tensors(node)
        if name in ATTENTION:
            q, k, v = (*node.args, *(node.kwargs[each] for each in _QKV if each in node.kwargs))[:3]
            return self._attend(node, (q, k, v))  # type: ignore[arg-type]
        if self._is_product(node):
            return self._multiply(node)
        if name in _SUMS and not self._is_alike(inputs):
            return frozenset({Origin(node)})
        return _passed(node, _NOTHING.union(*(self._origins[each] for each in inputs)))

    def _starts(self, node: Node) -> bool:
        """Whether the walk back ends at a node whatever it takes."""
        if node.op == "placeholder":
            return node not in self._parameters and _is_float(node)
        return called(node) in _ENDS

    def _attend(self, node: Node, arguments: tuple[Node, Node, Node]) -> Origins:
        self.attentions.append((node, arguments))
        self._results.add(node)
        return frozenset({Origin(node)})

    def _is_product(self, node: Node) -> bool:
        """Whether a node multiplies two activations as matrices."""
        factors = _factors(node)
        return len(factors) == 2 and all(self._origins[each] for each in factors)

    def _multiply(self, node: Node) -> Origins:
        """Recognise softmax(q k^T) v; any other product is an end of its own."""
        first, second = _factors(node)
        for weights, v in ((first, second), (second, first)):
            for origin in self._origins[weights]:
                if called(origin.node) in SOFTMAX:
                    scores = self._scores(origin.node)
                    if scores is not None:
                        return self._attend(node, (*scores, v))
        return frozenset({Origin(node)})

    def _scores(self, softmax: Node) -> tuple[Node, Node] | None:
        """Return q and k of what a softmax is taken of, through scales, masks and casts."""
        waiting, seen = tensors(softmax)[:1], set[Node]()
        while waiting:
            node = waiting.pop(0)  # the nearest first: masks and position biases come later
            if node in seen or node in self.linears:
                continue
            seen.add(node)
            if self._is_product(node):
                q, k = _factors(node)
                return q, k
            waiting += tensors(node)
        return None

    def _is_alike(self, inputs: list[Node]) -> bool:
        """Whether all that is added comes from the same linears, as in a rotary embedding."""
        sets = [
            {origin.node for origin in self._origins[each] if origin.node.op != "placeholder"}
            for each in inputs
        ]
        sets = [each for each in sets if each]
        return all(each == sets[0] for each in sets)


def tensors(node: Node) -> list[Node]:
    """Return a node's inputs that are tensors, or tuples of them, in order."""
    numbers = (int, float, bool, torch.SymInt)
    return [
        each
        for each in node.all_input_nodes
        if not isinstance(each.meta.get("example_value"), numbers)
    ]


def _factors(node: Node) -> list[Node]:
    """Return the two matrices that a node multiplies, or fewer."""
    if called(node) not in _PRODUCTS:
        return []
    matrices = [
        each
        for each in (*node.args, *node.kwargs.values())
        if isinstance(each, Node) and isinstance(each.meta.get("example_value"), torch.Tensor)
    ]
    return matrices[1:3] if called(node) == "baddbmm" else matrices[:2]


def _passed(node: Node, origins: Origins) -> Origins:
    """Note on origins what passing a node does to them."""
    name = called(node)
    if name == "glu":
        halves = [replace(origin, cut=True) for origin in origins]
        return frozenset([*halves, *(replace(half, activated=True) for half in halves)])
    if name in ACTIVATIONS:
        return frozenset(replace(origin, activated=True) for origin in origins)
    if name in _CUTS and _cuts(node):
        return frozenset(replace(origin, cut=True) for origin in origins)
    return origins


def _is_float(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cuts(node: Node) -> bool:
    """Whether a node takes a part: of `getitem`, an index into a tuple does not, a slice does."""
    if called(node) != "getitem":
        return True
    return isinstance(node.args[0], Node) and isinstance(
        node.args[0].meta.get("example_value"), torch.Tensor
    )


def flow_of(region: Region, outer: Sequence[Node], inputs: Sequence[Any]) -> Flow:
    """Return the flow of a region whose linears are marked.

    Args:
        region: a graph.
        outer: the placeholders of the outermost graph.
        inputs: their values.
    """
    linears = {}
    for node in region.gm.graph.nodes:
        form = match_linear(node)
        if form is not None and site_of(node) is not None:
            linears[node] = form.x
    parameters = {
        node
        for node, (index, _) in region.inputs.items()
        if isinstance(inputs[index], nn.Parameter) or "_buffers_" in str(outer[index].target)
    }
    return Flow(region.gm.graph, linears, parameters)
