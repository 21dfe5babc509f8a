"""select: mark the linears that the policy picks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.errors import SelectorError
from fp4graph.passes.site import mark, sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

    from fp4graph.policy import Policy
    from fp4graph.tags import LinearTag

_FRAGMENT = (
    "if torch.compile split the model (graph breaks, layers compiled alone), "
    "pass model= to backend() so that paths are whole"
)


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
        universe: the linears that terms are checked against; None takes the graph's own. A graph
            without linears is left alone.
    """

    name: ClassVar[str] = "select"
    policy: Policy
    universe: tuple[LinearTag, ...] | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        found = list(sites(gm))
        if not found:
            return
        tags = self.universe or tuple(site.tag for _, site in found)
        try:
            self.policy.check(tags)
        except SelectorError as error:
            if self.universe is None and not any(tag.block == 0 for tag in tags):
                raise error.with_hint(_FRAGMENT) from None
            raise
        for node, site in found:
            decision = self.policy.decide(site.tag)
            reason = decision.reason if decision.scheme else site.unsupported or decision.reason
            mark(node, replace(site, scheme=decision.scheme, reason=reason))
