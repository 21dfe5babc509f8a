"""The graphs within a graph: bodies of higher-order ops (checkpoint, nested regions, cond).

Dynamo lifts what a body reads to operands of the call, so a weight that is used in a body is
reached through the call's arguments, and a packed weight gets there the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from fp4graph.graph.match import match_linear
from fp4graph.graph.weight_source import source_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

# where the operands start, and whether they are one tuple
_OPERANDS: dict[str, tuple[int, bool]] = {
    "tag_activation_checkpoint": (1, False),
    "wrap": (1, False),
    "invoke_subgraph": (2, False),
    "cond": (3, True),
}


@dataclass(frozen=True)
class Region:
    """A graph module, and what its inputs are.

    Attributes:
        gm: the graph module.
        inputs: placeholders that are inputs of the outermost graph, with their index there and
            whether they come transposed.
        parent: the region whose graph calls it; None for the outermost.
        call: the node there that does.
        shared: whether another call had the same body before each got its own.
    """

    gm: GraphModule
    inputs: Mapping[Node, tuple[int, bool]]
    parent: Region | None = None
    call: Node | None = None
    shared: bool = False

    @property
    def unsupported(self) -> str | None:
        """Why nothing in it can be rewritten, or None."""
        region: Region | None = self
        while region is not None and region.call is not None:
            if _name(region.call) not in _OPERANDS:
                return f"it is inside {_name(region.call)}, a higher-order op that is left alone"
            region = region.parent
        return None


def regions(gm: GraphModule) -> Iterator[Region]:
    """Yield a graph and all graphs within it, outer ones first."""
    placeholders = (node for node in gm.graph.nodes if node.op == "placeholder")
    inputs = {node: (index, False) for index, node in enumerate(placeholders)}
    yield from _regions(Region(gm, inputs))


def _regions(region: Region) -> Iterator[Region]:
    yield region
    for call in region.gm.graph.nodes:
        for body in _bodies(call):
            inputs = {}
            for placeholder, operand in zip(_placeholders(body), _operands(call), strict=False):
                source, flipped = source_of(operand)
                if source is not None and source in region.inputs:
                    index, before = region.inputs[source]
                    inputs[placeholder] = index, flipped != before
            shared = body.meta.get(_UNSHARED, False)
            yield from _regions(Region(body, inputs, region, call, shared))


def lift(region: Region, name: str, tensor: Tensor, source: Node) -> Node:
    """Make a value of the outermost graph readable in a region.

    Args:
        region: where it is wanted.
        name: for the placeholders on the way.
        tensor: the value, for the nodes' metadata.
        source: its node in the outermost graph.
    """
    if region.parent is None:
        return source
    assert region.call is not None
    operand = lift(region.parent, name, tensor, source)
    call, found = region.call, None
    if operand in _operands(call):  # another body of the call, or another linear, has it already
        return _placeholders(region.gm)[_operands(call).index(operand)]
    for body in _bodies(call):
        last = _placeholders(body)[-1:]
        with (
            body.graph.inserting_after(*last)
            if last
            else body.graph.inserting_before(next(iter(body.graph.nodes)))
        ):
            placeholder = body.graph.placeholder(name)
        placeholder.meta["example_value"] = tensor
        if body is region.gm:
            found = placeholder
    start, nested = _OPERANDS[_name(call)]
    if nested:
        operands: Any = call.args[start]
        call.args = (*call.args[:start], (*operands, operand), *call.args[start + 1 :])
    else:
        call.args = (*call.args, operand)
    assert found is not None
    return found


def unshare(gm: GraphModule) -> None:
    """Give each call of a body with linears, where several calls share it, a copy of its own.

    One body serves all layers of a nested compile region; what is decided for one layer must not
    hold for the others.
    """
    seen: set[int] = set()
    labels: dict[str, int] = {}
    for region in regions(gm):
        for call in region.gm.graph.nodes:
            if not isinstance(call.target, HigherOrderOperator):
                continue
            for argument in call.all_input_nodes:
                body = _body(argument)
                if body is not None and id(body) in seen and _has_linears(body):
                    body = _own_copy(region.gm, call, argument, body, len(seen))
                seen.add(id(body))
            _relabel(call, labels)


def _relabel(call: Node, labels: dict[str, int]) -> None:
    """Give another body another label: `invoke_subgraph` keeps what it traced by it."""
    for index, label in enumerate(call.args):
        if isinstance(label, str):
            body = id(_bodies(call)[0])
            if labels.setdefault(label, body) != body:
                label = f"{label}_{len(labels)}"
                labels[label] = body
                call.update_arg(index, label)


def _has_linears(gm: GraphModule) -> bool:
    return any(match_linear(node) for region in regions(gm) for node in region.gm.graph.nodes)


def _own_copy(
    gm: GraphModule, call: Node, argument: Node, body: GraphModule, number: int
) -> GraphModule:
    own = copy_graph(body)
    own.meta[_UNSHARED] = body.meta[_UNSHARED] = True
    name = f"{argument.target}_{number}"
    setattr(gm, name, own)
    with gm.graph.inserting_before(call):
        new = gm.graph.get_attr(name)
    new.meta = dict(argument.meta)
    call.replace_input_with(argument, new)
    return own


_UNSHARED = "fp4graph_unshared"


def copy_graph(gm: GraphModule) -> GraphModule:
    """Copy a graph and all within it, with their marks; parameters and buffers stay shared."""
    graph = Graph()
    nodes: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    for old, new in nodes.items():
        new.meta = dict(old.meta)
    copy = GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in {node.target for node in gm.graph.nodes if _body(node) is not None}:
        setattr(copy, str(name), copy_graph(getattr(gm, str(name))))
    return copy


def _name(call: Node) -> str:
    return str(getattr(call.target, "_name", call.target))


def _body(node: Node) -> GraphModule | None:
    if node.op != "get_attr":
        return None
    owner = node.graph.owning_module
    found = None if owner is None else getattr(owner, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


def _bodies(call: Node) -> list[GraphModule]:
    if not isinstance(call.target, HigherOrderOperator):
        return []
    return [body for each in call.all_input_nodes if (body := _body(each)) is not None]


def _operands(call: Node) -> list[Node]:
    if _name(call) not in _OPERANDS:
        return []
    start, nested = _OPERANDS[_name(call)]
    operands: Any = call.args[start] if nested else call.args[start:]
    return list(operands)


def _placeholders(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]
