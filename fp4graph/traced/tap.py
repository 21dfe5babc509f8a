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
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch.fx import GraphModule, Node

    from fp4graph.linears.tags import LinearTag
    from fp4graph.traced.model import TracedModel

    Gradients = dict[LinearTag, list[Tensor]]
    Inputs = Mapping[str, Any]
    Losses = Callable[[int, Tensor], Iterator[Tensor]]


TRACED_ANEW = "the model was traced anew: inputs of another shape, or gradients on that were off"


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
class Step:
    """What linears saw of one input, and for each loss the gradients by what they gave."""

    index: int
    seen: dict[LinearTag, list[Seen]]
    gradients: list[Gradients]


@dataclass(frozen=True)
class _Place:
    """Where a linear's input, weight and output are found in its graph."""

    x: Node
    x_dim: int
    y: Node
    y_dim: int
    weight: int
    transposed: bool


@dataclass(frozen=True)
class Call:
    """What a linear saw in a call and gave, with its features in some dimension."""

    tag: LinearTag
    seen: Seen
    y: Tensor
    y_dim: int


class Watched:
    """A tagged graph that says what its plain linears worked on; stacks of experts are left out.

    Args:
        gm: the graph.

    Raises:
        StudyError: it has linears inside higher-order ops.
    """

    def __init__(self, gm: GraphModule) -> None:
        self._places = _places(gm)
        both = (node for _, place in self._places for node in (place.x, place.y))
        self._nodes = list(dict.fromkeys(both))
        self._run = tapped(gm, self._nodes)

    @property
    def tags(self) -> list[LinearTag]:
        """The linears, call by call."""
        return [tag for tag, _ in self._places]

    def __call__(self, *args: Any) -> tuple[Any, list[Call]]:
        """Run the graph; with gradients enabled its output has them by every linear's output."""
        if torch.is_grad_enabled():
            args = tuple(map(with_gradient, args))
        own, values = self._run(*args)
        by_node = dict(zip(self._nodes, values, strict=True))
        calls = []
        for tag, place in self._places:
            weight = args[place.weight].detach()
            weight_NK = weight.T if place.transposed else weight
            x = by_node[place.x].detach().movedim(place.x_dim, -1)
            calls.append(Call(tag, Seen(x, weight_NK), by_node[place.y], place.y_dim))
        return own, calls


def seen_by_tag(calls: Iterable[Call]) -> dict[LinearTag, list[Seen]]:
    """Return what each linear saw, call by call."""
    seen: dict[LinearTag, list[Seen]] = {}
    for call in calls:
        seen.setdefault(call.tag, []).append(call.seen)
    return seen


def gradients_by(
    calls: Sequence[Call],
    outputs: Sequence[Tensor],
    given: Sequence[Tensor] | None = None,
    more: Sequence[Tensor] = (),
) -> tuple[Gradients, list[Tensor | None]]:
    """Return the gradients by linears' outputs, and by more values, of what they have become.

    Args:
        calls: the linears.
        outputs: a scalar, or values with the gradients by them `given`.
        given: as many as outputs.
        more: values by which gradients are wanted too.

    Returns:
        for each linear that the outputs depend on its gradient by that linear's output, [..., N],
        call by call; zeros for a call that they do not depend on. And by `more`, None likewise.
    """
    targets = [*(call.y for call in calls), *more]
    if not targets or not outputs:
        return {}, [None for _ in more]
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs, targets, given, retain_graph=True, allow_unused=True
    )
    own, others = found[: len(calls)], found[len(calls) :]
    matter = {call.tag for call, each in zip(calls, own, strict=True) if each is not None}
    gradients: Gradients = {}
    for call, gradient in zip(calls, own, strict=True):
        if call.tag in matter:
            known = torch.zeros_like(call.y) if gradient is None else gradient
            gradients.setdefault(call.tag, []).append(known.movedim(call.y_dim, -1))
    return gradients, list(others)


class LinearTap:
    """Runs a traced model and keeps what its plain linears work on; stacks of experts are left out.

    A model whose gradients are wanted has to be traced with gradients enabled: code that turns them
    off for a while, as rotary embeddings do, turns them back to what they were while tracing.

    Args:
        traced: the model, traced; its dense form is run.

    Raises:
        StudyError: a graph has linears inside higher-order ops.
    """

    def __init__(self, traced: TracedModel) -> None:
        self._traced = traced
        self._calls: list[Call] = []
        self._runs = [(each, self._keeping(Watched(each.tagged))) for each in traced.graphs]

    def __call__(self, **inputs: Any) -> Any:
        """Run the model; with gradients enabled its output has them by every linear's output.

        Raises:
            StudyError: Dynamo traced it anew, so that nothing was seen.
        """
        self._calls.clear()
        graphs = len(self._traced.graphs)
        with ExitStack() as stack:
            for graph, run in self._runs:
                stack.enter_context(graph.running(run))
            out = self._traced(**inputs)
        if len(self._traced.graphs) > graphs:
            raise StudyError(TRACED_ANEW)
        return out

    @property
    def seen(self) -> dict[LinearTag, list[Seen]]:
        """Of the last run, what each linear saw, call by call."""
        return seen_by_tag(self._calls)

    def gradients(self, loss: Tensor) -> Gradients:
        """Return the gradient of something computed from the last run's output.

        Args:
            loss: a scalar. More losses may follow; what the run computed is kept for them.

        Returns:
            see `gradients_by`.
        """
        return gradients_by(self._calls, [loss])[0]

    def steps(self, inputs: Sequence[Inputs], losses: Losses | None = None) -> Iterator[Step]:
        """Yield what linears saw and the gradients of losses, input by input.

        Args:
            inputs: of the model, keyword arguments each.
            losses: yields scalars, from the number of an input and its logits; None: no gradients.
        """
        for index, each in enumerate(inputs):
            with torch.set_grad_enabled(losses is not None):
                logits = self(**each).logits
            found = losses(index, logits) if losses else ()
            yield Step(index, self.seen, [self.gradients(loss) for loss in found])

    def _keeping(self, run: Watched) -> Callable[..., Any]:
        def kept(*args: Any) -> Any:
            own, calls = run(*args)
            self._calls += calls
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


def with_gradient(arg: Any) -> Any:
    """Return a weight as a leaf of its own, so that gradients pass whatever the model's say."""
    if isinstance(arg, nn.Parameter) and arg.is_floating_point():
        return arg.detach().requires_grad_()
    return arg
