"""pack: quantise the weights of the linears that have a kernel."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fp4graph.graph.site import mark, sites
from fp4graph.packed.cache import CACHE, PackCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule


@dataclass(frozen=True)
class PackWeights:
    """Fetch or make the packed weight of each linear.

    Given:
        q = linear(x, q_weight, None)      # scheme nvfp4 W4A16; kernel reference
    Result, for a weight [32, 64]:
        q = linear(x, q_weight, None)      # packed [32, 32] [32, 4] []

    Raises:
        WeightError: a weight holds NaN or Inf; names the linear.
    """

    name: ClassVar[str] = "pack"
    cache: PackCache = CACHE

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """See the class."""
        for node, site in sites(gm):
            if site.kernel is None:
                continue
            assert site.weight is not None
            assert site.scheme is not None
            assert site.problem is not None
            entry = self.cache.get(
                example_inputs[site.weight],
                site.scheme,
                site.kernel,
                site.problem,
                transposed=site.transposed,
                rows=site.rows,
                fqn=site.tag.fqn,
            )
            mark(node, replace(site, entry=entry))
