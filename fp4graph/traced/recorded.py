"""What a model gives its one graph and takes from it, learnt without running the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from fp4graph.traced.model import TracedModel


NO_LOGITS = "its graph does not return the logits as they are"


class _Recorded(Exception):
    """Ends a call of the model early: what its graph is given is known."""


def graph_inputs(traced: TracedModel, inputs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """Return what the graph is given for an input of the model; None if another graph ran."""
    found: list[Any] = []

    def record(*args: Any) -> Any:
        found.extend(args)
        raise _Recorded

    try:
        with traced.graphs[0].running(record):
            traced(**inputs)
    except _Recorded:
        return tuple(found)
    return None


def output_place(
    traced: TracedModel, inputs: Mapping[str, Any], pick: Callable[[Any], Tensor]
) -> int:
    """Return which of the graph's outputs is what `pick` takes from the model's; -1 for none."""
    outputs: list[Any] = []

    def run(*args: Any) -> Any:
        made: Any = traced.graphs[0].tagged.graph.output_node().args[0]
        outputs.extend(map(_empty, made))
        return tuple(outputs)

    with traced.graphs[0].running(run):
        return place_of(pick(traced(**inputs)), outputs)


def place_of(picked: Tensor, outputs: Iterable[Any]) -> int:
    """Return which of some outputs it is; -1 for none."""
    return next((place for place, each in enumerate(outputs) if each is picked), -1)


def _empty(made: Any) -> Any:
    """Return something like a graph's output, without values."""
    value = made.meta.get("example_value") if isinstance(made, fx.Node) else made
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
