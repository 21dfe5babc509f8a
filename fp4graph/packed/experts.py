"""A stack of experts that owns its packed weights: what `convert` puts in a parameter's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fp4graph.kernels import grouped
from fp4graph.packed.module import PackedModule
from fp4graph.packed.stand_in import StandIn

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp4graph.formats import PackedWeight
    from fp4graph.packed.stand_in import Index
    from fp4graph.scheme import Scheme


class FP4Experts(PackedModule):
    """Stands where a model has the parameter [E, N, K] or [E, K, N] of its experts.

    Models' own code multiplies by it as by that parameter: see `StandIn`. What else is asked of it
    is an error.

    Args:
        weights: [N, K] of each expert, laid out one after the other.
        shape: [E, N, K].
        stored: shape of the parameter.
        transposed: whether it is multiplied by as [E, K, N].
        scheme: how it runs.
        dtype: of inputs and results.
        smooth: as in `PackedModule`.
        prepare: as in `PackedModule`.
    """

    def __init__(
        self,
        weights: Iterable[PackedWeight],
        shape: tuple[int, int, int],
        stored: torch.Size,
        scheme: Scheme,
        dtype: torch.dtype,
        smooth: Tensor | None = None,
        *,
        transposed: bool,
        prepare: bool = True,
    ) -> None:
        self.experts, N, K = shape
        matrix = (N, K)
        super().__init__(
            weights, matrix, stored, scheme, dtype, smooth, stacked=self.experts, prepare=prepare
        )
        self._transposed = transposed

    @property
    def stand_in(self) -> StandIn:
        """The stack as code meets it."""
        return StandIn(self, (self.experts,), self._shape, last_is_k=not self._transposed)

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply: x [E, M, K] by each expert; or [M, K], where expert e has the rows to offs[e].

        Returns:
            [E, M, N] or [M, N].
        """
        y: Tensor = self._grouped(self._taken(x), self._tensors(), offs)
        return y

    def grouped(self, x: Tensor, offs: Tensor) -> Tensor:
        """See `Multiplies`."""
        return self.forward(x, offs)

    def times(self, x: Tensor, index: Index, bias: Tensor | None) -> Tensor | None:
        """See `Multiplies`: x [E, M, K], or [..., K] by one, or [S, M, K] each by its own."""
        if index is None or (isinstance(index, Tensor) and index.ndim == 1):
            if x.ndim != 3 or bias is not None:
                return None
            if index is not None:
                return self._by_rows(x, index)
            return self.forward(x) if len(x) == self.experts else None
        packed = (each[index] for each in self._tensors())
        y: Tensor = self._op()(self._taken(x), *packed, bias)
        return y

    def _by_rows(self, x: Tensor, experts: Tensor) -> Tensor:
        known, order = experts.sort()
        ends = torch.searchsorted(known, torch.arange(self.experts, device=x.device), right=True)
        y: Tensor = self.forward(x[order].flatten(0, 1), ends * x.shape[1]).unflatten(
            0, x.shape[:2]
        )
        return y[order.argsort()]

    def _lay_out(self, weights: Iterable[PackedWeight]) -> None:
        super()._lay_out(weights)
        self._grouped = grouped(self._op())  # Dynamo would look into the cache of these
