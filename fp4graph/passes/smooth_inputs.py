"""smooth_inputs: divide what goes into linears whose weights' columns were multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fp4graph.fingerprint import fingerprint
from fp4graph.graph.match import match_linear
from fp4graph.graph.norms import scaled_by_norm, scales_of, serve_only
from fp4graph.graph.regions import lift, regions
from fp4graph.graph.site import site_of, unmarked
from fp4graph.graph.writes import writes_in_place, written
from fp4graph.passes.emit import cast, constant, move

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.fx import GraphModule, Node

    from fp4graph.graph.site import LinearSite

    _Input = tuple[Node, int, int, int]


@dataclass(frozen=True)
class SmoothInputs:
    """Divide the input of each packed linear that was calibrated with SmoothQuant (2211.10438).

    Given, weights whose columns were multiplied by s:
        h = norm_weight * normed
        q = linear(h, q_weight, None)      # scheme nvfp4 W4A16; kernel reference
        k = linear(h, k_weight, None)      # scheme nvfp4 W4A16; kernel reference
    Result:
        w = norm_weight * inverse_s
        h = w * normed
        q = linear(h, q_weight, None)
        k = linear(h, k_weight, None)

    Given, where others take what the norm gives:
        h = norm_weight * normed
        q = linear(h, q_weight, None)      # scheme nvfp4 W4A16; kernel reference
        r = torch.relu(h)
    Result:
        h = norm_weight * normed
        s = h * inverse_s
        q = linear(s, q_weight, None)
        r = torch.relu(h)

    The norm's weight stays the model's own, so that changes to it are seen.
    """

    name: ClassVar[str] = "smooth_inputs"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        known: dict[int, tuple[str, Tensor, Node]] = {}
        for region in list(regions(gm)):
            overwritten = written(region.gm.graph)
            groups: dict[_Input, list[Node]] = {}
            writes = 0
            for node in region.gm.graph.nodes:
                writes += writes_in_place(node)
                site, form = site_of(node), match_linear(node)
                smooth = None if site is None else _smooth(site)
                if smooth is None or form is None:
                    continue
                key = fingerprint(smooth)
                if key not in known:
                    known[key] = constant(gm, f"fp4graph_smooth_{len(known)}", 1 / smooth)
                groups.setdefault((form.x, form.x_dim, key, writes), []).append(node)
            for (x, x_dim, key, _), nodes in groups.items():
                inverse = lift(region, *known[key])
                chain = scaled_by_norm(x)
                if chain and x_dim == -1 and serve_only(chain, nodes, overwritten):
                    _fold(chain[-1], inverse)
                else:
                    _multiply(x, x_dim, nodes, inverse)


def _smooth(site: LinearSite) -> Tensor | None:
    """Return what a packed weight's columns were multiplied by, where the weight lies."""
    if site.entry is None or site.scheme is None or site.scheme.calibration is None:
        return None
    smooth = site.scheme.calibration.smooth.get(site.tag.fqn)
    return None if smooth is None else smooth.to(site.entry.tensors[0].device)


def _fold(norm: Node, inverse: Node) -> None:
    with norm.graph.inserting_before(norm):
        for scale in scales_of(norm):
            norm.replace_input_with(scale, cast(_product(scale, inverse), _dtype(scale)))


def _multiply(x: Node, x_dim: int, linears: list[Node], inverse: Node) -> None:
    with x.graph.inserting_before(linears[0]):
        smoothed = cast(_product(move(x, x_dim, -1), inverse), _dtype(x))
        smoothed = move(smoothed, -1, x_dim)
    for node in linears:
        node.replace_input_with(x, smoothed)


def _product(x: Node, row: Node) -> Node:
    made = x.graph.call_function(torch.mul, (x, row))
    value = x.meta["example_value"].to(torch.promote_types(_dtype(x), _dtype(row)))
    made.meta = {**unmarked(x), "example_value": value}
    return made


def _dtype(node: Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["example_value"].dtype
    return dtype
