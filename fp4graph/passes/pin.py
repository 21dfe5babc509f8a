"""Tie a compiled graph to the module that it was traced from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._dynamo.guards import GuardBuilder, install_guard
from torch._guards import TracingContext

if TYPE_CHECKING:
    from torch.fx import GraphModule


def pin_to_module(gm: GraphModule) -> None:
    """Make Dynamo recompile for another instance of the module whose frame it traced.

    Parameters are inputs of a graph, so Dynamo runs the graph of one decoder layer for all of them
    where layers are compiled alone, or after a graph break between them. What was decided for the
    first would then hold for all, and each call would pack the weights of another layer.
    """
    if TracingContext.try_get() is None:
        return
    for node in gm.graph.nodes:
        argument = node.meta.get("grapharg") if node.op == "placeholder" else None
        source = argument.source if argument is not None else None
        while hasattr(source, "base"):
            source = source.base
        if getattr(source, "local_name", None) == "self":
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))
            return
