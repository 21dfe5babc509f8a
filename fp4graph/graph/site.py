"""A linear in a graph: found by `tag`, decided on by `select` and `choose`, filled by `pack`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4graph.graph.regions import regions

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch.fx import GraphModule, Node

    from fp4graph.kernels import Kernel, Problem
    from fp4graph.linears.tags import LinearTag
    from fp4graph.packed.cache import PackEntry
    from fp4graph.scheme import Scheme

_KEY = "fp4graph"


@dataclass(frozen=True)
class Norm:
    """A norm that serves nothing but linears.

    Attributes:
        parameters: paths of its weight, without `.weight`, and bias.
        serves: paths of the linears.
    """

    parameters: tuple[str, ...]
    serves: tuple[str, ...]


@dataclass(frozen=True)
class LinearSite:
    """What is known of the linear that a node computes; it holds no node, so that it can be copied.

    Attributes:
        tag: who it is.
        weight: index of its weight among the graph's inputs; None if the graph computes it.
        transposed: whether the weight is stored [K, N].
        dtype: of the result, which under autocast is not the weight's.
        bytes_dense: size of the weight.
        tied: whether it is the embeddings' too.
        unsupported: why it cannot be rewritten, or None.
        scheme: how to run it; None leaves it dense.
        rows: the rows of the weight that run so, ascending; None for all.
        reason: which selector decided, or why it stays dense.
        problem: what a kernel has to solve.
        kernel: who will compute it.
        entry: its packed weight.
        merged: paths of the linears that the same op computes.
        caller: path of the module whose forward computes it; empty where unknown.
        norm: what scales its input last, if that serves nothing but linears; where it was looked
            for.
    """

    tag: LinearTag
    weight: int | None
    transposed: bool
    dtype: torch.dtype
    bytes_dense: int
    tied: bool = False
    unsupported: str | None = None
    scheme: Scheme | None = None
    rows: tuple[int, ...] | None = None
    reason: str = "not selected"
    problem: Problem | None = None
    kernel: Kernel | None = None
    entry: PackEntry | None = None
    merged: tuple[str, ...] = ()
    caller: str = ""
    norm: Norm | None = None

    @property
    def is_stack(self) -> bool:
        """Whether its weight is a stack of experts."""
        return len(self.tag.shape) == 3


def mark(node: Node, site: LinearSite) -> None:
    """Write a site on its node."""
    node.meta[_KEY] = site


def site_of(node: Node) -> LinearSite | None:
    """Return the site on a node, or None."""
    return node.meta.get(_KEY)


def unmark(gm: GraphModule) -> None:
    """Take all sites off a graph."""
    for node, _ in list(sites(gm)):
        del node.meta[_KEY]


def unmarked(node: Node) -> dict[str, Any]:
    """Return a node's metadata without its site."""
    return {key: value for key, value in node.meta.items() if key != _KEY}


def sites(gm: GraphModule) -> Iterator[tuple[Node, LinearSite]]:
    """Yield the marked nodes of a graph and of the graphs within it, with their sites, in order."""
    for region in regions(gm):
        for node in region.gm.graph.nodes:
            site = site_of(node)
            if site is not None:
                yield node, site
