"""A model's graph for calibration: what it is given, what is selected, where blocks start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fp4graph.errors import CalibrationError
from fp4graph.graph.match import match_linear
from fp4graph.graph.site import LinearSite, site_of
from fp4graph.traced.cuts import Cut
from fp4graph.traced.recorded import graph_inputs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.fx import GraphModule, Node

    from fp4graph.traced.model import TracedModel

    Args = tuple[Any, ...]


def selected(gm: GraphModule) -> dict[int, tuple[Node, LinearSite]]:
    """Return the selected linears by their place in a graph.

    Raises:
        CalibrationError: one cannot be calibrated, or shares its weight with one that stays dense.
    """
    found, dense = {}, {}
    for index, node in enumerate(gm.graph.nodes):
        site = site_of(node)
        if site is not None and site.scheme is not None:
            _check(site, node)
            found[index] = node, site
        elif site is not None and site.weight is not None:
            dense[site.weight] = site
    ways: dict[int | None, LinearSite] = {}
    for _, site in found.values():
        first = ways.setdefault(site.weight, site)
        if first.scheme != site.scheme:
            raise CalibrationError(
                f"{site.tag.fqn} has the weight of {first.tag.fqn}, which is to run in another "
                "way: give both one"
            )
        other = dense.get(-1 if site.weight is None else site.weight)
        if other is not None:
            raise CalibrationError(
                f"{site.tag.fqn} has the weight of {other.tag.fqn}, which is not selected: "
                "select both or none"
            )
    return found


def starts(found: Sequence[Cut], selected: Mapping[int, tuple[Node, LinearSite]]) -> list[Cut]:
    """Return where to begin anew: no weight's uses lie on both sides, none before the first."""
    uses: dict[int | None, list[int]] = {}
    for index, (_, site) in selected.items():
        uses.setdefault(site.weight, []).append(index)
    spans = [(min(each), max(each)) for each in uses.values()]
    starts = [cut for cut in found if not any(first < cut.index <= last for first, last in spans)]
    before = bool(spans) and (not starts or min(min(each) for each in spans) < starts[0].index)
    return [Cut(0, ()), *starts] if before or not starts else starts


@torch.no_grad()
def record(traced: TracedModel, batches: Iterable[Tensor | Mapping[str, Any]]) -> list[Args]:
    """Return the inputs of the model's graph for each batch; but for the first it is not run."""
    found: list[Args] = []
    for batch in batches:
        inputs = {"input_ids": batch, "use_cache": False} if isinstance(batch, Tensor) else batch
        if not traced.graphs:
            traced.settle(**inputs)
        args = graph_inputs(traced, inputs) if len(traced.graphs) == 1 else None
        if args is None:
            break  # another graph ran, which the caller notices
        found.append(args)
    if not traced.graphs:
        raise CalibrationError("there are no batches to calibrate with")
    return found


def _check(site: LinearSite, node: Node) -> None:
    """Check that a linear can be calibrated.

    Raises:
        CalibrationError: it cannot.
    """
    reason, form = site.unsupported, match_linear(node)
    if form is not None and isinstance(form.index, fx.Node):
        reason = "which expert it is comes out while the model runs"
    if reason is not None:
        raise CalibrationError(f"{site.tag.fqn}: {reason}")
