"""What comes into a block's linears: nodes of the graph, and a Hessian for each set of inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from fp4graph.graph.match import match_linear
from fp4graph.graph.norms import scaled_by_norm
from fp4graph.quantizers import Hessian, matrix_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.fx import Node

    from fp4graph.graph.match import LinearForm
    from fp4graph.graph.site import LinearSite


class Seen(NamedTuple):
    """A weight and what came into the linears that use it.

    Attributes:
        sites: its linears; more than one where it is used more than once a call.
        hessian: of all their inputs; weights with the same inputs share the object.
        from_norm: whether a norm's weight scales each input last.
        expert: of experts, which one; None elsewhere.
    """

    sites: tuple[LinearSite, ...]
    hessian: Hessian
    from_norm: bool
    expert: int | None = None

    @property
    def site(self) -> LinearSite:
        """The first of its linears."""
        return self.sites[0]

    @property
    def names(self) -> tuple[str, ...]:
        """What it goes by, one name a module path; see `matrix_name`."""
        paths = dict.fromkeys(site.tag.fqn for site in self.sites)
        return tuple(matrix_name(path, self.expert) for path in paths)


@dataclass(frozen=True)
class Input:
    """What comes into some linears: the nodes, and the Hessians that it is added to.

    Of experts there is a Hessian for each, elsewhere one. See `LinearForm` for the nodes.
    """

    x: Node
    x_dim: int
    offs: Node | None
    batched: bool
    hessians: list[tuple[Hessian, ...]] = field(default_factory=list)

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
        for hessians in self.hessians:
            for hessian, piece in zip(hessians, pieces, strict=True):
                hessian.add(piece)


def look(linears: Mapping[Node, LinearSite]) -> tuple[list[Seen], list[Input]]:
    """Return the weights of some linears, each with the Hessian that its inputs are added to."""
    uses: dict[object, list[tuple[LinearSite, LinearForm]]] = {}
    for node, site in linears.items():
        form = match_linear(node)
        assert form is not None
        index = form.index if isinstance(form.index, int) else None
        uses.setdefault((site.weight, index, site.rows), []).append((site, form))
    inputs: dict[object, Input] = {}
    shared: dict[object, tuple[Hessian, ...]] = {}
    found = []
    for each in uses.values():
        sites, forms = zip(*each, strict=True)
        keys = tuple(dict.fromkeys(map(_input_of, forms)))
        if keys not in shared:
            one_each = forms[0].offs is not None or forms[0].batched
            count = sites[0].tag.shape[0] if one_each else 1
            shared[keys] = tuple(Hessian(sites[0].tag.shape[-1]) for _ in range(count))
            for key in keys:
                inputs.setdefault(key, Input(*key)).hessians.append(shared[keys])
        hessians = shared[keys]
        if not forms[0].stacked:
            from_norm = all(scaled_by_norm(form.x) and form.x_dim == -1 for form in forms)
            found.append(Seen(sites, hessians[0], from_norm))
        elif isinstance(forms[0].index, int):
            found.append(Seen(sites, hessians[0], False, forms[0].index))
        else:
            found += [Seen(sites, h, False, expert) for expert, h in enumerate(hessians)]
    return found, list(inputs.values())


def _input_of(form: LinearForm) -> tuple[Node, int, Node | None, bool]:
    return form.x, form.x_dim, form.offs, form.batched
