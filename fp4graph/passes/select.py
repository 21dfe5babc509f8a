"""select: mark the linears that the policy picks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.graph.flow import flow_of
from fp4graph.graph.fused_parts import parts_of
from fp4graph.graph.regions import regions
from fp4graph.graph.site import mark, site_of, sites
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import GraphModule, Node

    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Decision, Policy


@dataclass(frozen=True)
class SelectLinears:
    """Ask the policy about every tagged linear.

    Given:
        q = linear(x, q_weight, None)      # role q; block 7
        d = linear(q, d_weight, None)      # role down; block 7
        o = linear(d, o_weight, None)      # role o; block 3
    Result, for `attn,blocks>4`:
        q = linear(x, q_weight, None)      # scheme nvfp4 W4A16; reason `attn,blocks>4`
        d = linear(q, d_weight, None)      # scheme none; reason not selected
        o = linear(d, o_weight, None)      # scheme none; reason not selected

    Given, a fused weight of which a part is picked:
        qkv = linear(x, qkv_weight, None)  # role qkv; block 7
        parts = qkv.split(4, -1)
        a = torch.nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
    Result, for `v`:
        qkv = linear(x, qkv_weight, None)  # scheme nvfp4 W4A16; rows 8 to 11
        parts = qkv.split(4, -1)
        a = torch.nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])

    Raises:
        SelectorError: a term matches nothing, or a part of a fused weight whose rows are not known.

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
            tags = {tag.fqn: tag for tag in self.universe}
            tags.update({site.tag.fqn: site.tag for _, site in found})  # which names tell less of
            self.policy.check(tuple(tags.values()))
        decisions = {node: self.policy.decide(site.tag) for node, site in found}
        beside: dict[str, str] = {}
        for node, site in found:
            if decisions[node].scheme:
                beside.setdefault(site.tag.fqn.rpartition(".")[0], site.tag.fqn)
        rows = self._rows_of_parts(gm, example_inputs, decisions)
        for node, site in found:
            decision = decisions[node]
            reason = decision.reason if decision.scheme else site.unsupported or decision.reason
            sibling = beside.get(site.tag.fqn.rpartition(".")[0])
            if decision.scheme is None and site.tag.role is Role.OTHER and sibling:
                reason = (
                    f"not selected: no rule knows its role, though {sibling} beside it is "
                    "selected; `other` and path: select it"
                )
            if node in rows:
                reason += f" for the rows of {','.join(decision.parts)}, the others stay dense,"
            mark(node, replace(site, scheme=decision.scheme, rows=rows.get(node), reason=reason))

    def _rows_of_parts(
        self, gm: GraphModule, example_inputs: Sequence[Any], decisions: Mapping[Node, Decision]
    ) -> dict[Node, tuple[int, ...]]:
        """Return the rows of fused weights of which only a part is picked."""
        rows: dict[Node, tuple[int, ...]] = {}
        outer = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for region in regions(gm):
            flow = None
            for node in region.gm.graph.nodes:
                site = site_of(node)
                if site is None or decisions[node].parts in ((), site.tag.parts):
                    continue
                flow = flow or flow_of(region, outer, example_inputs)
                known = parts_of(node, site.tag.role, flow)
                if not known:
                    self.policy.refuse_part(site.tag)
                rows[node] = tuple(sorted(r for part in decisions[node].parts for r in known[part]))
        return rows
