"""What goes into a model's linears and comes out, seen in one pass, with gradients if asked."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.errors import StudyError
from fp4graph.graph.match import match_linear
from fp4graph.graph.site import site_of, sites
from fp4graph.traced.cuts import tapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import GraphModule, Node

    from fp4graph.linears.tags import LinearTag
    from fp4graph.traced.model import TracedGraph, TracedModel


@dataclass(frozen=True)
class Seen:
    """A linear in one call, of which a run of the model may have several.

    Attributes:
        x: its input, [..., K].
        weight: [N, K].
    """

    x: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Place:
    """Where a linear's input, weight and output are found in its graph."""

    x: Node
    x_dim: int
    y: Node
    y_dim: int
    weight: int
    transposed: bool


class LinearTap:
    """Runs a traced model and keeps what its plain linears work on; stacks of experts are left out.

    A model whose gradients are wanted has to be traced with gradients enabled: code that turns them
    off for a while, as rotary embeddings do, turns them back to what they were while tracing.

    Args:
        traced: the model, traced; its dense form is run.

    Attributes:
        seen: of the last run, what each linear saw, call by call.

    Raises:
        StudyError: a graph has linears inside higher-order ops.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self.seen: dict[LinearTag, list[Seen]] = {}
        self._outputs: dict[LinearTag, list[tuple[Tensor, int]]] = {}
        self._runs: list[tuple[TracedGraph, Callable[..., Any]]] = []
        for graph in traced.graphs:
            places = _places(graph.tagged)
            nodes = list(dict.fromkeys(n for _, place in places for n in (place.x, place.y)))
            self._runs.append((graph, self._keeping(tapped(graph.tagged, nodes), places, nodes)))

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; with gradients enabled its output has them by every linear's output.

        Raises:
            StudyError: Dynamo traced it anew, so that nothing was seen.
        """
        self.seen.clear()
        self._outputs.clear()
        graphs = len(self._traced.graphs)
        with ExitStack() as stack:
            for graph, run in self._runs:
                stack.enter_context(graph.running(run))
            out = self._traced(**inputs)
        if len(self._traced.graphs) > graphs:
            raise StudyError(
                "the model was traced anew: inputs of another shape, or gradients on that were off"
            )
        return out

    def gradients(self, loss: Tensor) -> dict[LinearTag, list[Tensor]]:
        """Return the gradient of something computed from the last run's output.

        Args:
            loss: a scalar. More losses may follow; what the run computed is kept for them.

        Returns:
            for each linear that the loss depends on its gradient by that linear's output,
            [..., N], call by call as in `seen`; zeros for a call that it does not depend on.
        """
        calls = [(tag, *call) for tag, calls in self._outputs.items() for call in calls]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            loss, [y for _, y, _ in calls], retain_graph=True, allow_unused=True
        )
        matter = {tag for (tag, *_), each in zip(calls, found, strict=True) if each is not None}
        gradients: dict[LinearTag, list[Tensor]] = {}
        for (tag, y, y_dim), gradient in zip(calls, found, strict=True):
            if tag in matter:
                known = torch.zeros_like(y) if gradient is None else gradient
                gradients.setdefault(tag, []).append(known.movedim(y_dim, -1))
        return gradients

    def _keeping(self, run: Any, places: list[tuple[LinearTag, _Place]], nodes: list[Node]) -> Any:
        def kept(*args: Any) -> Any:
            if torch.is_grad_enabled():
                args = tuple(map(_with_gradient, args))
            own, values = run(*args)
            by_node = dict(zip(nodes, values, strict=True))
            for tag, place in places:
                weight = args[place.weight].detach()
                weight_NK = weight.T if place.transposed else weight
                x = by_node[place.x].detach().movedim(place.x_dim, -1)
                self.seen.setdefault(tag, []).append(Seen(x, weight_NK))
                self._outputs.setdefault(tag, []).append((by_node[place.y], place.y_dim))
            return own

        return kept


def _places(gm: GraphModule) -> list[tuple[LinearTag, _Place]]:
    found = []
    for node in gm.graph.nodes:
        site, form = site_of(node), match_linear(node)
        if site is None or form is None or site.weight is None or len(site.tag.shape) != 2:
            continue
        place = _Place(form.x, form.x_dim, node, form.y_dim, site.weight, site.transposed)
        found.append((site.tag, place))
    own = sum(site_of(node) is not None for node in gm.graph.nodes)
    if own < len(list(sites(gm))):
        raise StudyError("linears are inside higher-order ops, so their inputs are not seen")
    return found


def _with_gradient(arg: Any) -> Any:
    """Return a weight as a leaf of its own, so that gradients pass whatever the model's say."""
    if isinstance(arg, nn.Parameter) and arg.is_floating_point():
        return arg.detach().requires_grad_()
    return arg
