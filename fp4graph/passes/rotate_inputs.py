"""rotate_inputs: rotate what goes into linears whose weights were rotated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.formats import BlockFormat
from fp4graph.graph.match import match_linear
from fp4graph.graph.regions import regions
from fp4graph.graph.site import site_of, unmarked
from fp4graph.graph.writes import writes_in_place
from fp4graph.kernels import ROTATE
from fp4graph.passes.emit import move

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class RotateInputs:
    """Rotate the input of each packed linear whose scheme has a rotation.

    Given:
        q = linear(x, wq, None);  k = linear(x, wk, None)      # packed with quantizer="rtn@32"
    Result:
        h = fp4graph.rotate(x, 32)
        q = linear(h, wq, None);  k = linear(h, wk, None)      # to be rewritten

    One node a distinct input; an input that is written to in between is not the same input. Where
    inputs are rounded to FP4 (W4A4) nothing is added: the op that rounds them rotates them too.
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
                if isinstance(site.scheme.activations, BlockFormat):
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
