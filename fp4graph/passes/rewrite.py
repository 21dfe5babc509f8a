"""rewrite: put one op on packed buffers in the place of each packed linear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch._dynamo.source import ConstantSource
from torch.fx import Node

from fp4graph.kernels import FAKE_QUANTIZE
from fp4graph.passes.site import LinearSite, sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor
    from torch.fx import GraphModule


@dataclass(frozen=True)
class RewriteLinears:
    """Replace packed linears by their kernel's op.

    Given:
        y = torch._C._nn.linear(x, weight, bias)          # with its packed weight
    Result:
        y = fp4graph.reference_nvfp4(x, qdata, scale, per_tensor_scale, bias)
        # with activations="same" x is fp4graph.fake_quantize(x, "nvfp4"), one node a distinct x;
        # under autocast x and bias are first cast to the dtype that the linear would have used

    The weight's graph input stays, unused: Dynamo passes arguments by position.
    """

    name: ClassVar[str] = "rewrite"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        quantized: dict[tuple[Node, torch.dtype, str], Node] = {}
        for count, (node, site) in enumerate(list(sites(gm))):
            if site.entry is not None:
                _replace(gm, node, site, count, quantized)


def _replace(
    gm: GraphModule,
    node: Node,
    site: LinearSite,
    count: int,
    quantized: dict[tuple[Node, torch.dtype, str], Node],
) -> None:
    assert site.entry is not None
    assert site.kernel is not None
    assert site.scheme is not None
    graph = gm.graph
    with graph.inserting_before(node):
        source = node.args[site.x]
        assert isinstance(source, Node)
        x = _cast(gm, source, site.dtype)
        if site.scheme.activations is not None:
            key = (source, site.dtype, site.scheme.activations.name)
            if key not in quantized:
                quantized[key] = graph.call_function(FAKE_QUANTIZE, (x, key[2]))
                quantized[key].meta = dict(x.meta)
            x = quantized[key]
        buffers = [
            _buffer(gm, f"fp4graph_{count}_{i}", tensor)
            for i, tensor in enumerate(site.entry.tensors)
        ]
        bias = None if site.bias is None else _cast(gm, site.bias, site.dtype)
        op = site.kernel.ops[site.scheme.format.base]
        new = graph.call_function(op, (x, *buffers, bias))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _cast(gm: GraphModule, node: Node, dtype: torch.dtype) -> Node:
    value = node.meta["example_value"]
    if value.dtype == dtype:
        return node
    cast = gm.graph.call_method("to", (node, dtype))
    cast.meta = {**node.meta, "example_value": value.to(dtype)}
    return cast


def _buffer(gm: GraphModule, name: str, tensor: Tensor) -> Node:
    """Add a packed tensor as a buffer that AOTAutograd accepts.

    AOTAutograd asks where each parameter and buffer of Dynamo's module came from, and asserts that
    it is told; as buffers they count among the static inputs, which CUDA graphs do not copy.
    """
    gm.register_buffer(name, tensor)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:
        sources[name] = ConstantSource(source_name=f"fp4graph.{name}")
    node = gm.graph.get_attr(name)
    node.meta["example_value"] = tensor
    return node
