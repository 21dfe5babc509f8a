"""What goes into a model's linears, seen in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp4graph.errors import StudyError
from fp4graph.passes.cuts import tapped
from fp4graph.passes.match import match_linear
from fp4graph.passes.site import site_of, sites

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from fp4graph.tags import LinearTag
    from fp4graph.trace import TracedModel


class InputTap:
    """Runs a traced model and returns the inputs of its linears beside.

    Args:
        traced: the model, traced; its dense form is run.

    Raises:
        StudyError: a graph has linears inside higher-order ops.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._found: dict[LinearTag, Tensor] = {}
        for graph in traced.graphs:
            taken: dict[LinearTag, tuple[Node, int]] = {}
            for node in graph.tagged.graph.nodes:
                site, form = site_of(node), match_linear(node)
                if site is not None and form is not None:
                    taken[site.tag] = form.x, form.x_dim
            if len(taken) < len({site.tag for _, site in sites(graph.tagged)}):
                raise StudyError(
                    "linears are inside higher-order ops, so their inputs are not seen"
                )
            nodes = list({node: None for node, _ in taken.values()})
            run = tapped(graph.tagged, nodes)
            graph.run = self._keeping(run, taken, nodes)

    def _keeping(
        self, run: Any, taken: dict[LinearTag, tuple[Node, int]], nodes: list[Node]
    ) -> Any:
        def kept(*args: Any) -> Any:
            own, values = run(*args)
            by_node = dict(zip(nodes, values, strict=True))
            for tag, (node, dim) in taken.items():
                self._found[tag] = by_node[node].movedim(dim, -1)
            return own

        return kept

    @torch.no_grad()
    def __call__(self, **inputs: Any) -> dict[LinearTag, Tensor]:
        """Return the input of every linear, [..., K]."""
        self._found.clear()
        self._traced(**inputs)
        return dict(self._found)
