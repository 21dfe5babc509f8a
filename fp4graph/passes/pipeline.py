"""The passes in their order, and what a rewritten graph needs to run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fp4graph.errors import GradientError, OptionError
from fp4graph.graph.regions import regions
from fp4graph.graph.site import sites
from fp4graph.packed.stale import Binding
from fp4graph.passes.base import GraphPass, run_passes, skipped
from fp4graph.passes.choose import ChooseKernels, OnRefusal
from fp4graph.passes.merge import MergeLinears
from fp4graph.passes.pack import PackWeights
from fp4graph.passes.rewrite import RewriteLinears
from fp4graph.passes.rotate_inputs import RotateInputs
from fp4graph.passes.select import SelectLinears
from fp4graph.passes.smooth_inputs import SmoothInputs
from fp4graph.passes.tag import TagLinears
from fp4graph.private import SET_GRAD_ENABLED
from fp4graph.report import LinearRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

    from fp4graph.graph.site import LinearSite
    from fp4graph.kernels import Target
    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy


PASSES: tuple[type[GraphPass], ...] = (
    TagLinears,
    SelectLinears,
    ChooseKernels,  # before pack: the kernel fixes the packed layout
    PackWeights,  # before smooth_inputs, which reads what to divide by
    SmoothInputs,  # before rewrite: after it `match_linear` no longer finds the node
    RotateInputs,  # the same; what is rotated was divided before
    RewriteLinears,
    MergeLinears,  # after rewrite: it joins the kernels' ops
)
"""All passes in their order."""


def plan_passes(
    policy: Policy,
    on_refusal: OnRefusal,
    universe: tuple[LinearTag, ...] | None = None,
    target: Target | None = None,
) -> tuple[GraphPass, ...]:
    """Return the passes that decide and change nothing; they come after `TagLinears`.

    Raises:
        OptionError: `FP4GRAPH_SKIP` names what is no pass.
    """
    known = [each.name for each in PASSES]
    for name in skipped():
        if name not in known:
            raise OptionError(f"FP4GRAPH_SKIP: no pass {name!r}; passes are {', '.join(known)}")
    return SelectLinears(policy, universe), ChooseKernels(on_refusal, target)


def rewrite_passes() -> tuple[GraphPass, ...]:
    """Return the passes that act on what was decided."""
    return PackWeights(), SmoothInputs(), RotateInputs(), RewriteLinears(), MergeLinears()


def rows(gm: GraphModule) -> list[LinearRow]:
    """Return one row for each linear of a graph that went through the planning passes."""
    return [_row(site) for _, site in sites(gm)]


def _row(site: LinearSite) -> LinearRow:
    dense = LinearRow.of(site.tag, site.bytes_dense, site.reason)
    if site.kernel is None or site.problem is None:
        return dense
    plan = site.kernel.plan(site.problem)
    shared = "; the embeddings share its weight, and theirs stays dense" if site.tied else ""
    without = f"; FP4GRAPH_SKIP leaves out {', '.join(skipped())}" if skipped() else ""
    return replace(
        dense,
        reason=dense.reason + shared + without,
        selected=True,
        kernel=site.kernel.name,
        layout=plan.layout,
        tile=plan.tile,
        bytes_packed=_bytes_packed(site, plan.padded),
        rows=None if site.rows is None else len(site.rows),
        merged=site.merged,
    )


def _bytes_packed(site: LinearSite, padded: tuple[int, int] | None) -> int | None:
    if site.kernel is None or site.scheme is None:
        return None
    *experts, N, K = site.tag.shape
    rows = N if site.rows is None else len(site.rows)
    packed = math.prod(experts) * site.scheme.format.packed_bytes(*(padded or (rows, K)))
    kept = N - rows if site.kernel.saves_memory else N
    return packed + math.prod(experts) * kept * K * site.dtype.itemsize


def bindings(gm: GraphModule) -> tuple[Binding, ...]:
    """Return which graph input each packed weight of a rewritten graph came from."""
    return tuple(
        Binding(site.weight, site.entry)
        for _, site in sites(gm)
        if site.entry is not None and site.weight is not None
    )


def check_no_gradients(gm: GraphModule, example_inputs: Sequence[Any]) -> None:
    """Refuse to compile FP4 linears for a call that may be asked for gradients.

    Raises:
        GradientError: gradients are enabled, by the caller or within the graph, and a graph input
            requires them.
    """
    needs = (isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
    if (torch.is_grad_enabled() or _enables_gradients(gm)) and any(needs):
        raise GradientError(
            "FP4 linears have no gradients, and this call would need them: call the model under "
            "torch.no_grad() or torch.inference_mode(), and enable none within it"
        )


def _enables_gradients(gm: GraphModule) -> bool:
    return any(
        node.target is SET_GRAD_ENABLED and node.args[0] is True
        for region in regions(gm)
        for node in region.gm.graph.nodes
    )


__all__ = [
    "OnRefusal",
    "bindings",
    "check_no_gradients",
    "plan_passes",
    "rewrite_passes",
    "rows",
    "run_passes",
]
