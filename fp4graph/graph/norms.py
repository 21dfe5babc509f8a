"""Norms whose weight scales what goes into linears: what x / s can be folded into."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from fp4graph.graph.match import called, match_linear
from fp4graph.graph.site import Norm, site_of
from fp4graph.graph.weight_source import is_copy
from fp4graph.graph.writes import written

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.fx import GraphModule


def norms_of(gm: GraphModule, names: Mapping[Node, str]) -> dict[str, Norm]:
    """Return the norm of each linear whose input it scales last, by the linear's path.

    A norm that others listen to as well, or whose weight is computed (Gemma's 1 + w), is left out.

    Args:
        gm: a tagged graph.
        names: of the parameters among its inputs.
    """
    overwritten = written(gm.graph)
    groups: dict[Node, list[tuple[Node, str]]] = defaultdict(list)
    for node in gm.graph.nodes:
        site, form = site_of(node), match_linear(node)
        if site is not None and form is not None and form.x_dim == -1:
            groups[form.x].append((node, site.tag.fqn))
    found: dict[str, Norm] = {}
    for x, linears in groups.items():
        chain = scaled_by_norm(x)
        scales = scales_of(chain[-1]) if chain else []
        if not scales or not all(each in names for each in scales):
            continue
        if serve_only(chain, [node for node, _ in linears], overwritten):
            paths = tuple(dict.fromkeys(path for _, path in linears))
            norm = Norm(tuple(names[each] for each in scales), paths)
            found |= dict.fromkeys(paths, norm)
    return found


def scaled_by_norm(x: Node) -> list[Node]:
    """Return the nodes from an input back to where a norm's weight [K] multiplies it, or none."""
    chain = [x]
    while is_copy(chain[-1]) or _keeps_columns(chain[-1]):
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain if scales_of(chain[-1]) else []


def _keeps_columns(node: Node) -> bool:
    if called(node) not in ("view", "reshape"):
        return False
    (source, *_), value = node.args, node.meta["example_value"]
    assert isinstance(source, Node)
    return bool(source.meta["example_value"].shape[-1] == value.shape[-1])


def scales_of(node: Node) -> list[Node]:
    """Return what scales each column of a node's value: the weight of a norm, and its bias."""
    name, args = called(node), dict(enumerate(node.args))
    if name in ("layer_norm", "rms_norm") and node.op == "call_function":
        shape = node.kwargs.get("normalized_shape", args.get(1))
        weight = node.kwargs.get("weight", args.get(2))
        bias = node.kwargs.get("bias", args.get(3)) if name == "layer_norm" else None
        one = isinstance(shape, list | tuple) and len(shape) == 1
        return [each for each in (weight, bias) if isinstance(each, Node)] if one and weight else []
    if name == "mul":
        value: Tensor = node.meta["example_value"]
        return [each for each in node.all_input_nodes if value.ndim > 1 and _is_row(each, value)]
    return []


def _is_row(node: Node, value: Tensor) -> bool:
    row = node.meta.get("example_value")
    return isinstance(row, torch.Tensor) and row.shape == value.shape[-1:]


def serve_only(chain: list[Node], linears: list[Node], overwritten: set[Node]) -> bool:
    """Whether nobody but these linears takes what comes after the norm."""
    takers = set(linears)
    for node in chain:
        if node in overwritten or not set(node.users) <= takers:
            return False
        takers = {node}
    return True
