"""select: mark the linears that the policy picks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.passes.site import mark, sites
from fp4graph.tags import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

    from fp4graph.policy import Policy
    from fp4graph.tags import LinearTag


@dataclass(frozen=True)
class SelectLinears:
    """Ask the policy about every tagged linear.

    Given:
        a node marked LinearTag(..., Role.Q, block=7, ...), and the policy `attn,blocks>4`
    Result:
        the same node, marked scheme=nvfp4 W4A16, reason="`attn,blocks>4`"

    Raises:
        SelectorError: a term matches nothing, or only a part of a fused weight.

    Attributes:
        policy: what runs how.
        universe: the linears of the whole model, which terms are checked against if the graph has
            any; None checks nothing, for the graph may be a fragment.
    """

    name: ClassVar[str] = "select"
    policy: Policy
    universe: tuple[LinearTag, ...] | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        found = list(sites(gm))
        if found and self.universe is not None:
            seen = {site.tag.fqn: site.tag for _, site in found}  # which know more than names tell
            self.policy.check([seen.get(tag.fqn, tag) for tag in self.universe])
        beside: dict[str, str] = {}
        for _, site in found:
            if self.policy.decide(site.tag).scheme:
                beside.setdefault(site.tag.fqn.rpartition(".")[0], site.tag.fqn)
        for node, site in found:
            decision = self.policy.decide(site.tag)
            reason = decision.reason if decision.scheme else site.unsupported or decision.reason
            sibling = beside.get(site.tag.fqn.rpartition(".")[0])
            if decision.scheme is None and site.tag.role is Role.OTHER and sibling:
                reason = (
                    f"not selected: no rule knows its role, though {sibling} beside it is "
                    "selected; `other` and path: select it"
                )
            mark(node, replace(site, scheme=decision.scheme, reason=reason))
