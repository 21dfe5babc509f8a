"""merge: one op for linears of one input, where a kernel has such an op."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch._ops import OpOverload

from fp4graph.graph.regions import regions
from fp4graph.graph.site import mark, site_of
from fp4graph.graph.writes import writes_in_place
from fp4graph.kernels import KERNELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Graph, GraphModule, Node

_MERGED: dict[Any, Any] = {op: many for kernel in KERNELS for op, many in kernel.merged.items()}


@dataclass(frozen=True)
class MergeLinears:
    """Join the ops of linears that share their input, so that it is read and prepared once.

    The weights stay where they are, and each result is what it was, to the bit. Linears of a
    converted model are joined too.

    Given:
        q = fp4graph.cpu_nvfp4(x, q_tiles, q_row_scale, bias)
        k = fp4graph.cpu_nvfp4(x, k_tiles, k_row_scale, None)
    Result:
        qk = fp4graph.cpu_merged_nvfp4(x, [q_tiles, k_tiles], [q_row_scale, k_row_scale], [bias, None])
        q = qk[0]
        k = qk[1]

    Given, an input that is written to in between:
        q = fp4graph.cpu_nvfp4(x, q_tiles, q_row_scale, None)
        w = x.mul_(2)
        k = fp4graph.cpu_nvfp4(x, k_tiles, k_row_scale, None)
    Result:
        q = fp4graph.cpu_nvfp4(x, q_tiles, q_row_scale, None)
        w = x.mul_(2)
        k = fp4graph.cpu_nvfp4(x, k_tiles, k_row_scale, None)
    """  # noqa: E501

    name: ClassVar[str] = "merge"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        for region in regions(gm):
            for group in _groups(region.gm.graph):
                _merge(group)


def merges(gm: GraphModule) -> bool:
    """Whether a graph has ops that may be joined."""
    return any(node.target in _MERGED for region in regions(gm) for node in region.gm.graph.nodes)


def _groups(graph: Graph) -> list[list[Node]]:
    """Return the ops that can be joined, those of one input together, in the order of the graph."""
    groups: dict[tuple[Any, ...], list[Node]] = {}
    places: dict[Node, int] = {}
    writes = 0
    for place, node in enumerate(graph.nodes):
        places[node] = place
        writes += writes_in_place(node)
        if not isinstance(node.target, OpOverload) or node.target not in _MERGED:
            continue
        key = (node.target, node.args[0], writes)
        first = groups.setdefault(key, [node])[0]
        if node is first:
            continue
        if all(places[each] < places[first] for each in node.all_input_nodes):
            groups[key].append(node)
        else:  # it could not run where the first does
            groups[key, node] = [node]
    return [group for group in groups.values() if len(group) > 1]


def _merge(group: list[Node]) -> None:
    first = group[0]
    x, *columns = zip(*(node.args for node in group), strict=True)
    with first.graph.inserting_before(first):
        arguments = (x[0], *(list(each) for each in columns))
        many = first.graph.call_function(_MERGED[first.target], arguments)
        many.meta = {"example_value": [node.meta["example_value"] for node in group]}
        takes = [(many, index) for index in range(len(group))]
        results = [first.graph.call_function(operator.getitem, each) for each in takes]
    marks = [site_of(node) for node in group]
    paths = [site.tag.fqn for site in marks if site is not None]
    for node, result, site in zip(group, results, marks, strict=True):
        result.meta = dict(node.meta)
        if site is not None:
            others = tuple(path for path in paths if path != site.tag.fqn)
            mark(result, replace(site, merged=others))
        node.replace_all_uses_with(result)
        first.graph.erase_node(node)
