"""tag: find the linears of a graph and say who each one is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from fp4graph.graph.flow import flow_of
from fp4graph.graph.match import LinearForm, called, is_linear, match_linear
from fp4graph.graph.names import (
    caller_of,
    model_lists,
    named_linears,
    names_here,
    parameter_names,
    path_of,
)
from fp4graph.graph.regions import regions, unshare
from fp4graph.graph.roles_by_flow import roles_by_dataflow
from fp4graph.graph.siblings import mark_experts, side_by_side
from fp4graph.graph.site import LinearSite, mark, site_of, sites
from fp4graph.graph.weight_source import entry_of, source_of
from fp4graph.graph.writes import is_view, written
from fp4graph.linears.roles import tag_by_name
from fp4graph.linears.stacks import NO_LISTS, Lists, Stacks, block_lists, block_of, list_of
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule, Node

    from fp4graph.graph.names import Names
    from fp4graph.graph.regions import Region
    from fp4graph.linears.tags import LinearTag

_NO_PARAMETER = "its weight is no nn.Parameter"
_WRITTEN = "the graph changes its weight in place"
_ADDEND = "what it adds is not a bias of one value a row of the weight"
_PRODUCTS = {  # ops that multiply by a weight and are not matched as linears
    *("einsum", "bmm", "baddbmm", "mv", "addmv", "tensordot", "inner", "bilinear", "chain_matmul"),
    *("multi_head_attention_forward", "_native_multi_head_attention"),
    *("_transformer_encoder_layer_fwd", "matmul", "mm", "addmm"),
}


@dataclass(frozen=True)
class TagLinears:
    """Tag every linear with its path, role, block and shape.

    Given:
        q = linear(x, q_proj, None)
        g = linear(q, gate_proj, None)
    Result:
        q = linear(x, q_proj, None)        # path model.layers.0.self_attn.q_proj; role q; block 0
        g = linear(q, gate_proj, None)     # path model.layers.0.mlp.gate_proj; role gate; block 0

    Given, a weight that is stored transposed, and a product of two activations:
        q = torch.addmm(bias, x, q_proj)
        s = torch.matmul(q, q.t())
    Result:
        q = torch.addmm(bias, x, q_proj)   # path model.layers.0.self_attn.q_proj; role q; block 0
        s = torch.matmul(q, q.t())         # path none

    Given, a weight that a product reads which is not rewritten:
        q = torch.inner(x, q_proj)
    Result:
        q = torch.inner(x, q_proj)
        # unsupported its weight is read by inner, which is not rewritten

    Bodies of higher-order ops are tagged too, each call's apart. `stacks.py` says what a list of
    blocks is; that its members run one after another is seen here.

    Attributes:
        names: module paths by parameter, from `parameter_names(model)`; where given, paths are
            whole even if a submodule is compiled alone.
        tags: of the model's linears, as its modules tell; empty takes those in the graph.
        lists: of the model's blocks.
    """

    name: ClassVar[str] = "tag"
    names: Names = field(default_factory=dict)
    tags: tuple[LinearTag, ...] = ()
    lists: Lists = NO_LISTS

    @classmethod
    def of(cls, model: nn.Module | None) -> TagLinears:
        """Build the pass, with whole module paths where the model is known."""
        if model is None:
            return cls()
        tags = tuple(each.tag for each in named_linears(model))
        return cls(parameter_names(model), tags, model_lists(model))

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        unshare(gm)
        outer = [node for node in gm.graph.nodes if node.op == "placeholder"]
        names = names_here(outer, example_inputs, self.names)
        replace(self, names=names)._mark(gm, outer, example_inputs)

    def _mark(self, gm: GraphModule, outer: list[Node], example_inputs: Sequence[Any]) -> None:
        found_regions = list(regions(gm))
        overwritten = set().union(*(_written_inputs(region) for region in found_regions))
        for region in found_regions:
            for node in region.gm.graph.nodes:
                form = match_linear(node)
                if form is not None:
                    self._mark_linear(node, form, region, outer, example_inputs, overwritten)
        lists = self._place_in_blocks(gm, found_regions)
        for region in found_regions:
            _mark_roles(region, outer, example_inputs)
            mark_experts(region.gm.graph, lists)
            for placeholder, (index, _) in region.inputs.items():
                if isinstance(example_inputs[index], nn.Parameter):
                    self._mark_product(
                        placeholder, example_inputs[index], region, outer[index], index, lists
                    )
        found = list(sites(gm))
        known = self.tags or tuple(site.tag for _, site in found)
        stacks = Stacks.of(_in_lists(tag, lists) for tag in known)
        for node, site in found:
            mark(node, replace(site, tag=stacks.place(site.tag)))

    def _place_in_blocks(self, gm: GraphModule, found_regions: Sequence[Region]) -> Lists:
        """Find the lists of blocks and tell each linear its block; return the lists."""
        lists = self.lists | block_lists(site.tag.fqn for _, site in sites(gm))
        for region in found_regions:
            members: dict[str, dict[Node, int]] = defaultdict(dict)
            for node in region.gm.graph.nodes:
                site = site_of(node)
                block = None if site is None else block_of(site.tag.fqn, lists)
                if site is not None and block is not None:
                    members[list_of(site.tag.fqn, lists) or ""][node] = block
            nodes = region.gm.graph.nodes
            lists -= {name for name, each in members.items() if side_by_side(nodes, each)}
        for node, site in list(sites(gm)):
            mark(node, replace(site, tag=_in_lists(site.tag, lists)))
        return lists

    def _mark_linear(
        self,
        node: Node,
        form: LinearForm,
        region: Region,
        outer: Sequence[Node],
        inputs: Sequence[Any],
        overwritten: set[int],
    ) -> None:
        found = None if form.placeholder is None else region.inputs.get(form.placeholder)
        index, flipped = found or (None, False)
        weight = None if index is None else inputs[index]
        is_parameter = isinstance(weight, nn.Parameter)
        if not is_parameter and not is_linear(node):
            return  # a product of two activations
        value = weight if isinstance(weight, torch.Tensor) else form.weight.meta["example_value"]
        if value.ndim != (3 if form.stacked and is_parameter else 2):
            return
        *experts, rows, columns = value.shape
        transposed = form.transposed != flipped
        shape = (*experts, columns, rows) if transposed else (*experts, rows, columns)
        unsupported = region.unsupported or form.unsupported
        if not is_parameter:
            unsupported = unsupported or _NO_PARAMETER
        elif index in overwritten:
            unsupported = unsupported or _WRITTEN
        elif form.bias is not None and form.bias.meta["example_value"].shape != shape[-2:-1]:
            unsupported = unsupported or _ADDEND
        tag = self._tag(node, None if index is None else outer[index], weight, shape, region)
        if form.batched and tag.role is Role.OTHER:
            return  # each head's own matrix, or the like: see _mark_product
        if len(shape) == 3 and tag.role is Role.OTHER:
            tag = replace(tag, role=Role.EXPERT, why=tag.why or "one of a stack, chosen by tokens")
        mark(
            node,
            LinearSite(
                tag=tag,
                weight=index if is_parameter else None,
                transposed=transposed,
                dtype=node.meta["example_value"].dtype,
                bytes_dense=value.nbytes,
                tied=index is not None
                and any(called(user) == "embedding" for user in outer[index].users),
                unsupported=unsupported,
                caller=caller_of(node, shared=region.shared),
            ),
        )

    def _mark_product(
        self,
        placeholder: Node,
        weight: nn.Parameter,
        region: Region,
        source: Node,
        index: int,
        lists: Lists,
    ) -> None:
        """Mark the first reader of stacked experts, or of a matrix the first product."""
        for user, alias in _readers(placeholder):
            first = (*user.args, user.kwargs.get("input"))[0]
            is_addend = called(user) in ("addmm", "baddbmm", "addmv") and first is alias
            if site_of(user) is not None or user.op == "output" or is_addend:
                continue
            tag = _in_lists(self._tag(user, source, weight, tuple(weight.shape), region), lists)
            is_stack = tag.role is Role.EXPERT and weight.ndim == 3
            if not is_stack and (weight.ndim not in (2, 3) or called(user) not in _PRODUCTS):
                continue
            reason = f"its weight is read by {called(user)}, which is not rewritten"
            site = LinearSite(
                tag, index, False, weight.dtype, weight.nbytes, unsupported=reason, reason=reason
            )
            mark(user, site)
            return

    def _tag(
        self,
        node: Node,
        source: Node | None,
        weight: object,
        shape: tuple[int, ...],
        region: Region,
    ) -> LinearTag:
        known = self.names.get(weight, ()) if isinstance(weight, nn.Parameter) else ()
        path = path_of(node, source, known, shared=region.shared)
        return tag_by_name(path, shape)


def _in_lists(tag: LinearTag, lists: Lists) -> LinearTag:
    """Return a tag for a model whose lists of blocks are known."""
    placed = tag_by_name(tag.fqn, tag.shape, lists)
    if placed.role is Role.OTHER:  # what its use tells
        placed = replace(placed, role=tag.role, why=tag.why, expert=tag.expert)
    return placed


_UNSURE = {  # (what a name says, what it stands for as well)
    (Role.ROUTER, Role.GATE),
    (Role.GATE, Role.ROUTER),
    (Role.GATE, Role.ATTN_GATE),
    (Role.UP, Role.GATE_UP),
}


def _mark_roles(region: Region, outer: Sequence[Node], inputs: Sequence[Any]) -> None:
    """Let the flow of data say what names do not, and which kind of gate a gate is."""
    for node, (role, why) in roles_by_dataflow(flow_of(region, outer, inputs)).items():
        site = site_of(node)
        assert site is not None
        named = site.tag.role
        if named is Role.EXPERT and role in (Role.GATE, Role.UP, Role.GATE_UP, Role.DOWN):
            mark(node, replace(site, tag=replace(site.tag, expert=role)))
        unnamed = named is Role.OTHER and (site.tag.block is None) == (role is Role.LM_HEAD)
        if unnamed or (named, role) in _UNSURE:
            mark(node, replace(site, tag=replace(site.tag, role=role, why=why)))


def _written_inputs(region: Region) -> set[int]:
    nodes = written(region.gm.graph)
    return {index for node, (index, _) in region.inputs.items() if node in nodes}


def _readers(placeholder: Node, alias: Node | None = None) -> list[tuple[Node, Node]]:
    """Return what reads an input, and as which node: itself, a view, a plain copy, one entry."""
    found: list[tuple[Node, Node]] = []
    for user in (alias or placeholder).users:
        entry, _ = entry_of(user) or (user, None)
        follow = source_of(entry)[0] is placeholder or is_view(user)
        found += _readers(placeholder, user) if follow else [(user, alias or placeholder)]
    return found
