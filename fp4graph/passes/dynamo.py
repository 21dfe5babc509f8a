"""What is asked of Dynamo beyond its public face, in one place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._guards import TracingContext

if TYPE_CHECKING:
    from torch.fx import GraphModule

_RECOMPILES = torch._dynamo.config.recompile_limit


def pin_to_module(gm: GraphModule) -> None:
    """Make Dynamo recompile for another instance of the module whose frame it traced.

    Parameters are inputs of a graph, so Dynamo runs the graph of one decoder layer for all of them
    where layers are compiled alone, or after a graph break between them. What was decided for the
    first would then hold for all, and each call would pack the weights of another layer.
    """
    if TracingContext.try_get() is None:
        return
    for node in gm.graph.nodes:
        source: Any = getattr(node.meta.get("grapharg"), "source", None)
        while hasattr(source, "base"):
            source = source.base
        if getattr(source, "local_name", None) == "self":
            install_guard(source.make_guard(GuardBuilder.ID_MATCH))
            return


def make_room_for_recompiles() -> None:
    """Let a new backend object compile as often as Dynamo lets one alone; make excess an error.

    Dynamo counts the graphs of all backends together, and past `recompile_limit` runs the plain
    model without a word: an ablation over nine selectors would report the ninth as undamaged.
    """
    config = torch._dynamo.config
    config.recompile_limit += _RECOMPILES
    config.accumulated_recompile_limit += _RECOMPILES
    if not config.suppress_errors:
        config.fail_on_recompile_limit_hit = True
