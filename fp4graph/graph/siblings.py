"""Numbered siblings in a graph: blocks run one after another, experts side by side."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

from fp4graph.graph.site import mark, site_of
from fp4graph.linears.stacks import below_block
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.fx import Graph, Node

    from fp4graph.linears.stacks import Lists

_LINEARS_OF_EXPERTS = {Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN, Role.OTHER}


def side_by_side(nodes: Iterable[Node], members: Mapping[Node, int]) -> bool:
    """Whether several siblings are there and none's result reaches another.

    Args:
        nodes: of a graph, in order.
        members: linears, with the number of the sibling that each belongs to.
    """
    before: dict[Node, frozenset[int]] = {}
    for node in nodes:
        reached = frozenset[int]().union(*(before.get(each, ()) for each in node.all_input_nodes))
        if node in members:
            if reached - {members[node]}:
                return False
            reached |= {members[node]}
        if reached:
            before[node] = reached
    return len(set(members.values())) > 1


def mark_experts(graph: Graph, lists: Lists) -> None:
    """Give the role of an expert to numbered siblings side by side in a block with a router.

    Given:
        `b.0.r` (router), `b.0.e.0.u` (up), `b.0.e.0.d` (down), `b.0.e.1.u`, ...
    Result:
        `b.0.e.0.u` (expert, its up), `b.0.e.0.d` (expert, its down), ...

    Args:
        graph: with its linears marked, each with its own role.
        lists: of the model's blocks.
    """
    groups: dict[str, dict[Node, int]] = defaultdict(dict)
    routed: set[str] = set()
    for node in graph.nodes:
        site = site_of(node)
        if site is None or site.tag.block is None:
            continue
        below = below_block(site.tag.fqn, lists)
        block = site.tag.fqn.removesuffix(below)
        if site.tag.role is Role.ROUTER:
            routed.add(block)
        parts = below.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal() and site.tag.role in _LINEARS_OF_EXPERTS:
                groups[block + ".".join(parts[:place])][node] = int(part)
                break
    for name, members in groups.items():
        inside = any(name.startswith(block) for block in routed)
        if inside and side_by_side(graph.nodes, members):
            for node in members:
                site = site_of(node)
                assert site is not None
                own = None if site.tag.role is Role.OTHER else site.tag.role
                why = "one of several side by side, beside a router"
                tag = replace(site.tag, role=Role.EXPERT, expert=own, why=why)
                mark(node, replace(site, tag=tag))
