"""rewrite: put one op on packed buffers in the place of each packed linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.graph.match import match_linear
from fp4graph.graph.regions import lift, regions
from fp4graph.graph.site import LinearSite, mark, site_of, unmarked
from fp4graph.graph.writes import writes_in_place
from fp4graph.kernels import before, grouped
from fp4graph.passes.emit import cast, constant, move, put_among_dense, take
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from fp4graph.packed.cache import PackEntry

    _Input = tuple[Node, int, torch.dtype, tuple[Any, ...] | None, int]


@dataclass(frozen=True)
class RewriteLinears:
    """Replace packed linears by their kernel's op.

    Given:
        q = linear(x, q_weight, bias)      # scheme nvfp4 W4A16; kernel reference
        k = linear(x, k_weight, None)      # reason not selected
    Result:
        q = fp4graph.reference_nvfp4(x, qdata, scale, per_tensor_scale, bias)
        k = linear(x, k_weight, None)

    Given, inputs that are rounded too, each once:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A4; kernel reference
        k = linear(x, k_weight, None)      # scheme mxfp4 W4A4; kernel reference
    Result:
        r = fp4graph.fake_quantize(x, "mxfp4", 0)
        q = fp4graph.reference_mxfp4(r, qdata, scale, None)
        k = fp4graph.reference_mxfp4(r, k_qdata, k_scale, None)

    Given, the same where the kernel rounds inputs itself:
        q = linear(x, q_weight, None)      # scheme nvfp4 W4A4; kernel scaled_mm
    Result:
        q = fp4graph.scaled_mm_nvfp4(x, qdata, scale, per_tensor_scale, None)

    Given, autocast, whose result is bfloat16:
        q = linear(x, q_weight, bias)      # scheme mxfp4 W4A16; kernel reference; dtype bfloat16
    Result:
        h = x.to(torch.bfloat16)
        b = bias.to(torch.bfloat16)
        q = fp4graph.reference_mxfp4(h, qdata, scale, b)

    Given, rows of a fused weight:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A16; kernel reference; rows 8 to 31
    Result:
        p = fp4graph.reference_mxfp4(x, qdata, scale, None)
        w = q_weight.narrow(0, 0, 8)
        d = linear(x, w, None)
        q = torch.cat([d, p], -1)

    Given, experts that share the rows of x:
        y = torch._grouped_mm(x, experts, offs)       # scheme mxfp4 W4A16; kernel reference
    Result:
        y = fp4graph.grouped_reference_mxfp4(x, [qdata, scale], offs)

    The weight's graph input stays, unused: Dynamo passes arguments by position.
    """

    name: ClassVar[str] = "rewrite"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        packed: dict[PackEntry, list[tuple[str, Tensor, Node]]] = {}
        for region in list(regions(gm)):
            quantized: dict[_Input, Node] = {}
            buffers: dict[PackEntry, list[Node]] = {}
            writes = 0
            for node in list(region.gm.graph.nodes):
                writes += writes_in_place(node)
                site = site_of(node)
                if site is None or site.entry is None:
                    continue
                entry = site.entry
                if entry not in packed:
                    packed[entry] = _register(gm, f"fp4graph_{len(packed)}", entry)
                if entry not in buffers:
                    buffers[entry] = [lift(region, *each) for each in packed[entry]]
                _replace(node, site, buffers[entry], quantized, writes)


def _replace(
    node: Node,
    site: LinearSite,
    packed: list[Node],
    quantized: dict[_Input, Node],
    writes: int,
) -> None:
    form = match_linear(node)
    assert form is not None
    assert site.kernel is not None
    assert site.problem is not None
    assert site.scheme is not None
    assert site.entry is not None
    graph = node.graph
    packed, index = packed[: len(site.entry.tensors)], packed[len(site.entry.tensors) :]
    with graph.inserting_before(node):
        x = move(cast(form.x, site.dtype), form.x_dim, -1)
        if site.scheme.activations is Activations.SAME:
            # an input that is written to in between is not the same input
            first = before(site.kernel, site.problem, site.scheme.rotation)
            key = (form.x, form.x_dim, site.dtype, first, writes)
            if first is not None and key not in quantized:
                quantized[key] = graph.call_function(first[0], (x, *first[1:]))
                quantized[key].meta = dict(x.meta)
            x = quantized.get(key, x)
        op = site.kernel.op_for(site.problem)
        value = node.meta["example_value"].movedim(form.y_dim, -1)
        bias = None if form.bias is None else cast(form.bias, site.dtype)
        if site.rows is not None:
            value = value.narrow(-1, 0, len(site.rows))
            bias = bias and graph.call_method("index_select", (bias, 0, *index))
        if form.index is not None:
            packed = [take(each, form.index) for each in packed]
        if form.offs is not None or form.batched:
            new = graph.call_function(grouped(op), (x, packed, form.offs))
        else:
            new = graph.call_function(op, (x, *packed, bias))
        new.meta = {**unmarked(node), "example_value": value}
        if site.rows is not None:
            new = put_among_dense(new, site.rows, index[0], node, form)
        new = move(new, -1, form.y_dim)
        mark(new, site)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _register(gm: GraphModule, name: str, entry: PackEntry) -> list[tuple[str, Tensor, Node]]:
    tensors = enumerate((*entry.tensors, *entry.index))
    return [constant(gm, f"{name}_{index}", tensor) for index, tensor in tensors]
