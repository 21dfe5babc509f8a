"""What comes into a block's linears: nodes of the graph, and a Hessian for each input."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from fp4graph.calibrate import Hessian, matrix_name
from fp4graph.passes.match import match_linear
from fp4graph.passes.smooth_inputs import scaled_by_norm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.fx import Node

    from fp4graph.passes.match import LinearForm
    from fp4graph.passes.site import LinearSite


class Seen(NamedTuple):
    """A linear and what came into it.

    Attributes:
        site: the linear.
        hessian: of its input; linears that share an input share the object.
        from_norm: whether a norm's weight scales the input last.
        expert: of experts, which one; None elsewhere.
    """

    site: LinearSite
    hessian: Hessian
    from_norm: bool
    expert: int | None = None

    @property
    def name(self) -> str:
        """What its weight goes by; see `matrix_name`."""
        return matrix_name(self.site.tag.fqn, self.expert)


@dataclass(frozen=True)
class Input:
    """What comes into some linears: the nodes, and a Hessian, or one for each expert.

    See `LinearForm` for the nodes.
    """

    x: Node
    x_dim: int
    offs: Node | None
    batched: bool
    hessians: tuple[Hessian, ...]

    @classmethod
    def of(cls, form: LinearForm, site: LinearSite) -> Input:
        """Begin with nothing seen."""
        count = site.tag.shape[0] if form.offs is not None or form.batched else 1
        hessians = tuple(Hessian(site.tag.shape[-1]) for _ in range(count))
        return cls(form.x, form.x_dim, form.offs, form.batched, hessians)

    @property
    def nodes(self) -> list[Node]:
        """The nodes whose values `add` takes."""
        return [self.x] if self.offs is None else [self.x, self.offs]

    def add(self, x: Tensor, offs: Tensor | None = None) -> None:
        """Take in the values of one batch."""
        if offs is not None:
            pieces = [x[start:end] for start, end in pairwise([0, *offs.tolist()])]
        else:
            pieces = list(x) if self.batched else [x.movedim(self.x_dim, -1)]
        for hessian, piece in zip(self.hessians, pieces, strict=True):
            hessian.add(piece)


def look(linears: Mapping[Node, LinearSite]) -> tuple[list[Seen], list[Input]]:
    """Return a block's linears, each with the Hessian that its input is to be added to."""
    inputs: dict[object, Input] = {}
    found = []
    for node, site in linears.items():
        form = match_linear(node)
        assert form is not None
        key = (form.x, form.x_dim, form.offs, form.batched)
        if key not in inputs:
            inputs[key] = Input.of(form, site)
        source = inputs[key]
        if not form.stacked:
            from_norm = bool(scaled_by_norm(form.x)) and form.x_dim == -1
            found.append(Seen(site, source.hessians[0], from_norm))
        elif isinstance(form.index, int):
            found.append(Seen(site, source.hessians[0], False, form.index))
        else:
            found += [Seen(site, h, False, expert) for expert, h in enumerate(source.hessians)]
    return found, list(inputs.values())
