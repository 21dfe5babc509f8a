"""A traced graph cut before a block: what comes first is run once, what follows many times.

Given:
    h1 = block0(h0);  h2 = block1(h1);  logits = head(h2)
Result, cut before block1:
    a graph of the same inputs and `h1` that runs block1 and the head alone
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fp4graph.graph.effects import is_pure, under_way
from fp4graph.graph.regions import regions
from fp4graph.graph.site import site_of, sites
from fp4graph.graph.writes import written

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from fp4graph.traced.model import TracedGraph


@dataclass(frozen=True)
class Cut:
    """A place in a graph.

    Attributes:
        index: of the node that comes right after it.
        live: what is made before it and used after it, inputs of the graph left out.
    """

    index: int
    live: tuple[Node, ...]

    @property
    def bytes(self) -> int:
        """Size of the live values."""
        return sum(map(_bytes, self.live))

    @property
    def device(self) -> torch.device:
        """Where the live values lie, `cpu` if there is no tensor."""
        values = (node.meta.get("example_value") for node in self.live)
        found = (value.device for value in values if isinstance(value, Tensor))
        return next(found, torch.device("cpu"))


def places(graphs: Sequence[TracedGraph]) -> list[Cut] | str:
    """Return where a traced model is cut: at its start and before each block; or why it is not."""
    if len(graphs) != 1:
        return f"Dynamo made {len(graphs)} graphs of it"
    found = cuts(graphs[0].tagged)
    if isinstance(found, str):
        return found
    return [Cut(0, ()), *found] if found else "it has no blocks"


def cuts(gm: GraphModule) -> list[Cut] | str:
    """Return a cut before each block of a graph, in order; or why there can be none.

    Between the last linear of a block and the first of the next it is made where least is alive.
    """
    nodes = list(gm.graph.nodes)
    own = [(index, site) for index, node in enumerate(nodes) if (site := site_of(node))]
    if len(own) < len(list(sites(gm))):
        return "linears are inside higher-order ops"
    if len(list(regions(gm))) > 1:
        return "it has graphs within its graph"
    overwritten = written(gm.graph)
    if any(node.op == "placeholder" for node in overwritten):
        return "the graph writes to its inputs in place"
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    open_at = list(under_way(nodes))
    found: list[Cut] = []
    before, seen = None, 0
    for index, site in own:
        block = (site.tag.stack, site.tag.block)
        if site.tag.block is not None and block != before:
            between = [at for at in range(seen + 1, index + 1) if not open_at[at]]
            if not between:
                return "autocast, vmap or a gradient mode is set around its blocks"
            places = [_cut(nodes, at, last_use) for at in between]
            places = [place for place in places if overwritten.isdisjoint(place.live)]
            if not places:
                return "the graph writes in place to what goes from block to block"
            found.append(min(places, key=lambda cut: (cut.bytes, -cut.index)))
            before = block
        seen = index
    return found


def _cut(nodes: list[Node], index: int, last_use: dict[Node, int]) -> Cut:
    made = (node for node in nodes[:index] if node.op not in ("placeholder", "get_attr"))
    return Cut(index, tuple(node for node in made if last_use[node] >= index))


def segment(
    gm: GraphModule,
    start: Cut,
    end: Cut | None = None,
    outputs: Sequence[Node] | None = None,
    inputs: Collection[Node] | None = None,
) -> GraphModule:
    """Return the graph from one cut to another; marks are kept.

    Args:
        gm: the whole graph.
        start: where it begins; its inputs are the graph's, then the values that are live there.
        end: where it ends, None for the end of the graph.
        outputs: what it returns; None for what is live at its end, or what the graph returns.
        inputs: which of the graph's inputs it takes; None for all.
    """
    graph, copies = Graph(), dict[Node, Node]()
    nodes = list(gm.graph.nodes)
    for node in nodes:
        if node.op == "placeholder" and (inputs is None or node in inputs):
            copies[node] = graph.node_copy(node)
    copies.update({node: graph.placeholder(f"live_{node.name}") for node in start.live})
    copies.update({node: graph.node_copy(node) for node in nodes if node.op == "get_attr"})
    if end is not None and outputs is None:
        outputs = end.live
    for node in nodes[start.index : None if end is None else end.index]:
        if node in copies or node.op == "placeholder":
            continue
        if node.op != "output" or outputs is None:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
    for old, new in copies.items():
        new.meta = dict(old.meta)
    if outputs is not None:
        graph.output(tuple(copies[node] for node in outputs))
        graph.eliminate_dead_code(lambda node: not is_pure(node))
    return GraphModule(gm, graph)


class Part:
    """What lies between two cuts, as a function of a graph's inputs and of what is live there.

    It has just the inputs that it uses: with all of them, taking a model to pieces would cost the
    square of its blocks. Arguments as in `segment`.

    Attributes:
        gm: the graph.
    """

    def __init__(
        self,
        gm: GraphModule,
        start: Cut,
        end: Cut | None = None,
        outputs: Sequence[Node] | None = None,
    ) -> None:
        nodes = list(gm.graph.nodes)[start.index : None if end is None else end.index]
        used = {each for node in nodes for each in node.all_input_nodes} | set(outputs or ())
        given = gm.graph.find_nodes(op="placeholder")
        self._taken = [place for place, node in enumerate(given) if node in used]
        self.gm = segment(gm, start, end, outputs, {given[place] for place in self._taken})

    def __call__(self, args: Sequence[Any], live: Sequence[Any] = ()) -> Any:
        """Run it on all inputs of the graph and the values that are live at its start."""
        return self.gm(*(args[place] for place in self._taken), *live)


def tapped(gm: GraphModule, nodes: Collection[Node]) -> GraphModule:
    """Return the graph with more outputs: (its own, the values of `nodes`)."""
    graph, copies = Graph(), dict[Node, Node]()
    out: Any = graph.graph_copy(gm.graph, copies)
    graph.output((out, tuple(copies[node] for node in nodes)))
    return GraphModule(gm, graph)


def _bytes(node: Node) -> int:
    value = node.meta.get("example_value")
    return math.prod(map(int, value.shape)) * value.itemsize if isinstance(value, Tensor) else 8
