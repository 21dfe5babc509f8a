"""The passes in their order, and what a rewritten graph needs to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.errors import GradientError
from fp4graph.passes.base import GraphPass, run_passes
from fp4graph.passes.choose import ChooseKernels, OnRefusal
from fp4graph.passes.pack import PackWeights
from fp4graph.passes.rewrite import RewriteLinears
from fp4graph.passes.select import SelectLinears
from fp4graph.passes.site import sites
from fp4graph.report import LinearRow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule

    from fp4graph.passes.pack_cache import PackEntry
    from fp4graph.policy import Policy
    from fp4graph.tags import LinearTag


@dataclass(frozen=True)
class Binding:
    """A packed weight and the graph input that it must stay in step with."""

    index: int
    entry: PackEntry


def plan_passes(
    policy: Policy, on_refusal: OnRefusal, universe: tuple[LinearTag, ...] | None = None
) -> tuple[GraphPass, ...]:
    """Return the passes that decide and change nothing; they come after `TagLinears`."""
    return (
        SelectLinears(policy, universe),
        ChooseKernels(on_refusal),  # before pack, for the packed layout is the kernel's
    )


def rewrite_passes() -> tuple[GraphPass, ...]:
    """Return the passes that act on what was decided."""
    return (
        PackWeights(),  # before rewrite, which reads its buffers
        RewriteLinears(),
    )


def rows(gm: GraphModule) -> list[LinearRow]:
    """Return one row for each linear of a graph that went through the planning passes."""
    return [
        LinearRow.of(
            site.tag,
            site.bytes_dense,
            site.reason,
            site.kernel.name if site.kernel else None,
            site.scheme.format.packed_bytes(*site.tag.shape)
            if site.kernel and site.scheme
            else None,
        )
        for _, site in sites(gm)
    ]


def bindings(gm: GraphModule) -> tuple[Binding, ...]:
    """Return which graph input each packed weight of a rewritten graph came from."""
    return tuple(
        Binding(site.weight, site.entry)
        for _, site in sites(gm)
        if site.entry is not None and site.weight is not None
    )


def check_no_gradients(example_inputs: Sequence[Any]) -> None:
    """Refuse to compile FP4 linears for a call that may be asked for gradients.

    Raises:
        GradientError: gradients are enabled and a graph input requires them.
    """
    needs = (isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
    if torch.is_grad_enabled() and any(needs):
        raise GradientError(
            "FP4 linears have no gradients, and this call would need them: call the model under "
            "torch.no_grad() or torch.inference_mode()"
        )


def bind(run: Callable[..., Any], bound: tuple[Binding, ...]) -> Callable[..., Any]:
    """Wrap a compiled graph so that each call first sees to it that no packed weight is stale."""

    def run_checked(*args: Any) -> Any:
        for binding in bound:
            binding.entry.ensure(args[binding.index])
        return run(*args)

    return run_checked if bound else run


__all__ = [
    "Binding",
    "OnRefusal",
    "bind",
    "bindings",
    "check_no_gradients",
    "plan_passes",
    "rewrite_passes",
    "rows",
    "run_passes",
]
