"""What W4A4 does to inputs, in a graph that is run while codes are found; gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fp4graph.graph.match import match_linear
from fp4graph.graph.site import site_of
from fp4graph.quantizers import Transform
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from fp4graph.formats import BlockFormat


class RoundInput(nn.Module):
    """Rounds a linear's input as it is rounded when the model runs, transformed as it is then.

    The gradient is that of no rounding.

    Attributes:
        transform: of the weight.
    """

    def __init__(self, format: BlockFormat, x_dim: int) -> None:
        super().__init__()
        self._format, self._x_dim = format, x_dim
        self.transform = Transform()

    def forward(self, x: Tensor) -> Tensor:
        """Return the input, for a weight that is as it was before the transform."""
        taken = self.transform.of_input(x.movedim(self._x_dim, -1))
        rounded = self._format.fake_quantize(taken.detach())
        rounded = taken + (rounded - taken).detach()
        return self.transform.undo_input(rounded).to(x.dtype).movedim(-1, self._x_dim)


def round_inputs(gm: GraphModule) -> dict[str, RoundInput]:
    """Round the inputs of all linears of a graph whose scheme is W4A4; by path."""
    found: dict[str, RoundInput] = {}
    for node in list(gm.graph.nodes):
        site, form = site_of(node), match_linear(node)
        if site is None or form is None or site.scheme is None:
            continue
        if site.scheme.activations is not Activations.SAME:
            continue
        fqn = site.tag.fqn
        if fqn not in found:
            found[fqn] = RoundInput(site.scheme.format, form.x_dim)
            gm.add_submodule(f"fp4graph_{len(found)}", found[fqn])
        name = f"fp4graph_{list(found).index(fqn) + 1}"
        with gm.graph.inserting_before(node):
            rounded = gm.graph.call_module(name, (form.x,))
            rounded.meta = {"example_value": form.x.meta["example_value"]}
        node.replace_input_with(form.x, rounded)
    gm.recompile()
    return found
