"""Roles of linears from what their results flow into: names are not asked.

For each value of a graph: which linears' results it is made of, through views, norms, rotary
embeddings, products and the like, and whether they passed an activation or were cut into parts on
the way. The walk back ends at linears, at attention, at softmax, at products of two activations,
and where unlike values are added, which is the residual stream. From that:

    q, k, v      what reaches attention's three arguments; all three, or two: qkv, kv
    q_a -> q_b   a linear that reaches another through no more than a norm: a low-rank chain,
                 kv_a -> kv_b likewise
    o            takes the result of attention; attn_gate: an activated factor of what it takes
    gate, up     the two factors of what `down` takes, of which gate passed an activation;
                 up alone where there is one; gate_up where one linear is both
    router       meets top-k
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fp4graph.tags import Role

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch.fx import Graph

_ACTIVATIONS = {
    *("silu", "gelu", "relu", "relu6", "sigmoid", "tanh", "elu", "celu", "selu", "softplus"),
    *("hardswish", "hardsigmoid", "mish", "leaky_relu", "logsigmoid", "erf", "relu_", "silu_"),
}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "causal_conv1d_fn"}
_CUTS = {"chunk", "split", "tensor_split", "split_with_sizes", "narrow", "unbind", "getitem"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm"}
_ATTENTION = {"scaled_dot_product_attention", "flex_attention"}
_QKV = ("query", "key", "value")
_SOFTMAX = {"softmax", "_softmax"}
_SUMS = {"add", "iadd", "add_", "sub", "addcmul"}
_TOP = {"topk", "argmax", "sort", "argsort"}
_ENDS = _SOFTMAX | _TOP | _CONVOLUTIONS | {"embedding"}
_MOST_PROJECTIONS = 5


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


_Origins = frozenset[Origin]
_Found = Iterator[tuple[Node, Role, str]]
_NOTHING: _Origins = frozenset()


def roles_by_dataflow(
    graph: Graph, linears: Mapping[Node, Node], parameters: Collection[Node]
) -> dict[Node, tuple[Role, str]]:
    """Return the role of each linear that a rule knows, and the rule.

    Args:
        graph: a graph as Dynamo makes it.
        linears: the nodes that are linears, each with its input.
        parameters: the graph's inputs that are parameters or buffers, not activations.
    """
    flow = _Flow(graph, linears, parameters)
    found: dict[Node, tuple[Role, str]] = {}
    for rule in (_attention, _mlp, _router):
        for node, role, why in rule(flow):
            found.setdefault(node, (role, why))
    return found


class _Flow:
    """The origins of every value of a graph."""

    def __init__(
        self, graph: Graph, linears: Mapping[Node, Node], parameters: Collection[Node]
    ) -> None:
        self.linears = linears
        self._parameters = parameters
        self.nodes = list(graph.nodes)
        self.attentions: list[tuple[Node, tuple[Node, Node, Node]]] = []
        self._results: set[Node] = set()
        self._origins: dict[Node, _Origins] = {}
        for node in self.nodes:  # in order of execution, so what is asked for is there
            self._origins[node] = self._of(node)

    def __getitem__(self, node: Node) -> _Origins:
        return self._origins[node]

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

    def _of(self, node: Node) -> _Origins:
        if node in self.linears or self._starts(node):
            return frozenset({Origin(node)})
        if node.op not in ("call_function", "call_method"):
            return _NOTHING
        name, inputs = name_of(node), _tensors(node)
        if name in _ATTENTION:
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
        return name_of(node) in _ENDS

    def _attend(self, node: Node, arguments: tuple[Node, Node, Node]) -> _Origins:
        self.attentions.append((node, arguments))
        self._results.add(node)
        return frozenset({Origin(node)})

    def _is_product(self, node: Node) -> bool:
        """Whether a node multiplies two activations as matrices."""
        factors = _factors(node)
        return len(factors) == 2 and all(self._origins[each] for each in factors)

    def _multiply(self, node: Node) -> _Origins:
        """Recognise softmax(q k^T) v; any other product is an end of its own."""
        first, second = _factors(node)
        for weights, v in ((first, second), (second, first)):
            for origin in self._origins[weights]:
                if name_of(origin.node) in _SOFTMAX:
                    scores = self._scores(origin.node)
                    if scores is not None:
                        return self._attend(node, (*scores, v))
        return frozenset({Origin(node)})

    def _scores(self, softmax: Node) -> tuple[Node, Node] | None:
        """Return q and k of what a softmax is taken of, through scales, masks and casts."""
        waiting, seen = _tensors(softmax)[:1], set[Node]()
        while waiting:
            node = waiting.pop(0)  # the nearest first: masks and position biases come later
            if node in seen or node in self.linears:
                continue
            seen.add(node)
            if self._is_product(node):
                q, k = _factors(node)
                return q, k
            waiting += _tensors(node)
        return None

    def _is_alike(self, inputs: list[Node]) -> bool:
        """Whether all that is added comes from the same linears, as in a rotary embedding."""
        sets = [
            {origin.node for origin in self._origins[each] if origin.node.op != "placeholder"}
            for each in inputs
        ]
        sets = [each for each in sets if each]
        return all(each == sets[0] for each in sets)


def _attention(flow: _Flow) -> _Found:
    for result, arguments in flow.attentions:
        reached = _reached(flow, arguments)
        if len(reached) > _MOST_PROJECTIONS:
            continue  # the walk went astray
        chains = {
            below: above
            for above in reached
            if flow.is_plain(flow.linears[above])
            for below in flow.linears_of(flow.linears[above])
        }
        for linear, parts in reached.items():
            role = _PARTS.get(("".join(sorted(parts)), linear in chains.values()))
            if role is not None and linear not in chains:
                yield linear, role, f"reaches attention's {', '.join(sorted(parts))}"
        for below, above in chains.items():
            parts = reached[above] | reached.get(below, set())
            role = Role.Q_A if parts == {"q"} else Role.KV_A
            yield below, role, "the first of a low-rank chain into attention"
        yield from _after_attention(flow, result, reached)


def _reached(flow: _Flow, arguments: tuple[Node, Node, Node]) -> dict[Node, set[str]]:
    """Return the linears that reach attention, and which of its arguments, by letter."""
    reached: dict[Node, set[str]] = {}
    for part, argument in zip("qkv", arguments, strict=True):
        for linear, origins in flow.linears_of(argument).items():
            if not all(origin.activated for origin in origins):
                reached.setdefault(linear, set()).add(part)
    return reached


def _after_attention(flow: _Flow, result: Node, reached: Collection[Node]) -> _Found:
    for linear, x in flow.linears.items():
        if not any(origin.node is result for origin in flow[x]):
            continue
        yield linear, Role.O, "takes attention's result"
        for factor, origins in flow.linears_of(x).items():
            if factor not in reached and all(origin.activated for origin in origins):
                yield factor, Role.ATTN_GATE, "an activated factor of attention's result"


_PARTS = {
    ("q", False): Role.Q,
    ("k", False): Role.K,
    ("v", False): Role.V,
    ("kqv", False): Role.QKV,
    ("kv", False): Role.KV,
    ("q", True): Role.Q_B,
    ("k", True): Role.K,
    ("v", True): Role.V,
    ("kv", True): Role.KV_B,
}


def _mlp(flow: _Flow) -> _Found:
    for down, x in flow.linears.items():
        if not flow.is_plain(x):
            continue
        factors = flow.linears_of(x)
        activated = [n for n, all_ in factors.items() if any(each.activated for each in all_)]
        if len(factors) == 1 and activated:
            (only, origins), why = next(iter(factors.items())), "passes an activation into down"
            both = {origin.activated for origin in origins} == {True, False}
            if both and all(origin.cut for origin in origins):
                yield only, Role.GATE_UP, "cut in two factors of what down takes"
            else:
                yield only, Role.UP, why
            yield down, Role.DOWN, "takes an activated linear's result"
        elif len(factors) == 2 and len(activated) == 1:
            other = next(each for each in factors if each is not activated[0])
            yield activated[0], Role.GATE, "passes an activation, then multiplies"
            yield other, Role.UP, "is multiplied by an activated linear"
            yield down, Role.DOWN, "takes the product of gate and up"


def _router(flow: _Flow) -> _Found:
    for node in flow.nodes:
        inputs = _tensors(node)
        if name_of(node) != "topk" or not inputs:
            continue
        values = [inputs[0]]
        for origin in flow[inputs[0]]:
            if name_of(origin.node) in _SOFTMAX:
                values += _tensors(origin.node)[:1]
        for value in values:
            linears = flow.linears_of(value)
            rest = {origin.node for origin in flow[value]} - set(linears)
            if all(name_of(each) in _TOP for each in rest):  # groups are chosen first
                for linear in linears:
                    yield linear, Role.ROUTER, "meets top-k"


def name_of(node: Node) -> str:
    """Return the plain name of what a node calls."""
    if not isinstance(node.target, str):
        return str(getattr(node.target, "__name__", node.target)).rpartition(".")[2]
    return node.target


def _tensors(node: Node) -> list[Node]:
    """Return a node's inputs that are tensors, or tuples of them, in order."""
    numbers = (int, float, bool, torch.SymInt)
    return [
        each
        for each in node.all_input_nodes
        if not isinstance(each.meta.get("example_value"), numbers)
    ]


def _factors(node: Node) -> list[Node]:
    """Return the two matrices that a node multiplies, or fewer."""
    if name_of(node) not in _PRODUCTS:
        return []
    matrices = [
        each
        for each in (*node.args, *node.kwargs.values())
        if isinstance(each, Node) and isinstance(each.meta.get("example_value"), torch.Tensor)
    ]
    return matrices[1:3] if name_of(node) == "baddbmm" else matrices[:2]


def _passed(node: Node, origins: _Origins) -> _Origins:
    """Note on origins what passing a node does to them."""
    name = name_of(node)
    if name == "glu":
        halves = [replace(origin, cut=True) for origin in origins]
        return frozenset([*halves, *(replace(half, activated=True) for half in halves)])
    if name in _ACTIVATIONS:
        return frozenset(replace(origin, activated=True) for origin in origins)
    if name in _CUTS and _cuts(node):
        return frozenset(replace(origin, cut=True) for origin in origins)
    return origins


def _is_float(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _cuts(node: Node) -> bool:
    """Whether a node takes a part: of `getitem`, an index into a tuple does not, a slice does."""
    if name_of(node) != "getitem":
        return True
    return isinstance(node.args[0], Node) and isinstance(
        node.args[0].meta.get("example_value"), torch.Tensor
    )
