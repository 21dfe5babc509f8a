"""The flow of data in a region of a traced model, as `origins.py` tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fp4graph.passes.match import match_linear
from fp4graph.passes.origins import Flow
from fp4graph.passes.site import site_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    from fp4graph.passes.regions import Region


def flow_of(region: Region, outer: Sequence[Node], inputs: Sequence[Any]) -> Flow:
    """Return the flow of a region whose linears are marked.

    Args:
        region: a graph.
        outer: the placeholders of the outermost graph.
        inputs: their values.
    """
    linears = {}
    for node in region.gm.graph.nodes:
        form = match_linear(node)
        if form is not None and site_of(node) is not None:
            linears[node] = form.x
    parameters = {
        node
        for node, (index, _) in region.inputs.items()
        if isinstance(inputs[index], nn.Parameter) or "_buffers_" in str(outer[index].target)
    }
    return Flow(region.gm.graph, linears, parameters)
