"""rotate_inputs: rotate what goes into linears whose weights were rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.graph.match import match_linear
from fp4graph.graph.regions import regions
from fp4graph.graph.site import site_of, unmarked
from fp4graph.graph.writes import writes_in_place
from fp4graph.kernels import ROTATE
from fp4graph.passes.emit import move
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class RotateInputs:
    """Rotate the input of each packed linear whose scheme has a rotation.

    Given:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A16, rtn@32
        k = linear(x, k_weight, None)      # scheme mxfp4 W4A16, rtn@32
        v = linear(x, v_weight, None)      # reason not selected
    Result:
        h = fp4graph.rotate(x, 32)
        q = linear(h, q_weight, None)
        k = linear(h, k_weight, None)
        v = linear(x, v_weight, None)

    Given, an input that is written to in between:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A16, rtn@32
        y = x.add_(1)
        k = linear(x, k_weight, None)      # scheme mxfp4 W4A16, rtn@32
    Result:
        h = fp4graph.rotate(x, 32)
        q = linear(h, q_weight, None)
        y = x.add_(1)
        i = fp4graph.rotate(x, 32)
        k = linear(i, k_weight, None)

    Given, inputs that are rounded to FP4 too, by an op that rotates them itself:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A4, rtn@32
    Result:
        q = linear(x, q_weight, None)      # scheme mxfp4 W4A4, rtn@32
    """

    name: ClassVar[str] = "rotate_inputs"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        for region in regions(gm):
            rotated: dict[tuple[Node, int, int, int], Node] = {}
            writes = 0
            for node in list(region.gm.graph.nodes):
                writes += writes_in_place(node)
                site = site_of(node)
                if site is None or site.scheme is None or not site.scheme.rotation:
                    continue
                if site.scheme.activations is Activations.SAME:
                    continue
                form = match_linear(node)
                assert form is not None
                key = (form.x, form.x_dim, site.scheme.rotation, writes)
                if key not in rotated:
                    with node.graph.inserting_before(node):
                        x = move(form.x, form.x_dim, -1)
                        made = node.graph.call_function(ROTATE, (x, site.scheme.rotation))
                        made.meta = unmarked(x)
                        rotated[key] = move(made, -1, form.x_dim)
                node.replace_input_with(form.x, rotated[key])
