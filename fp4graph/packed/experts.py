"""A stack of experts that owns its packed weights: what `convert` puts in a parameter's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4graph.kernels import grouped
from fp4graph.packed.module import PackedModule
from fp4graph.packed.stand_in import StandIn, compute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fp4graph.formats import PackedWeight
    from fp4graph.packed.stand_in import Index
    from fp4graph.scheme import Scheme


class FP4Experts(PackedModule):
    """Stands where a model has the parameter [E, N, K] or [E, K, N] of its experts.

    Models' own code multiplies by it as by that parameter: see `StandIn`. What else is asked of it
    is an error.

    Args:
        weights: [N, K] of each expert, laid out one after the other.
        shape: of the parameter.
        transposed: whether that is stored [E, K, N].
        scheme: how it runs.
        dtype: of inputs and results.
        smooth: as in `PackedModule`.
        prepare: as in `PackedModule`.
    """

    def __init__(
        self,
        weights: Iterable[PackedWeight],
        shape: tuple[int, int, int],
        scheme: Scheme,
        dtype: torch.dtype,
        smooth: Tensor | None = None,
        *,
        transposed: bool,
        prepare: bool = True,
    ) -> None:
        E, *matrix = shape
        N, K = reversed(matrix) if transposed else matrix
        super().__init__(weights, (N, K), scheme, dtype, smooth, stacked=E, prepare=prepare)
        self.shape, self.ndim = torch.Size(shape), 3
        self.transposed = transposed
        self._is_hf_initialized = True  # transformers draws no weights at random here

    def forward(self, x: Tensor, offs: Tensor | None = None) -> Tensor:
        """Multiply: x [E, M, K] by each expert; or [M, K], where expert e has the rows to offs[e].

        Returns:
            [E, M, N] or [M, N].
        """
        y: Tensor = self._grouped(self._taken(x), self._tensors(), offs)
        return y

    def _lay_out(self, weights: Iterable[PackedWeight]) -> None:
        super()._lay_out(weights)
        self._grouped = grouped(self._op())  # Dynamo would look into the cache of these

    def grouped(self, x: Tensor, offs: Tensor) -> Tensor:
        """Multiply x [M, K] where expert e has the rows to offs[e]."""
        y: Tensor = self(x, offs)
        return y

    def times(self, x: Tensor, index: Index = None) -> Tensor | None:
        """See `Multiplies`: x [E, M, K], or [..., K] by one, or [S, M, K] each by its own."""
        if index is None:
            return self(x) if x.ndim == 3 and len(x) == self.shape[0] else None
        if isinstance(index, Tensor) and index.ndim == 1:
            return self._by_rows(x, index) if x.ndim == 3 else None
        packed = (each[index] for each in self._tensors())
        y: Tensor = self._op()(self._taken(x), *packed, None)
        return y

    def _by_rows(self, x: Tensor, experts: Tensor) -> Tensor:
        known, order = experts.sort()
        ends = torch.searchsorted(known, torch.arange(self.shape[0], device=x.device), right=True)
        y: Tensor = self(x[order].flatten(0, 1), ends * x.shape[1]).unflatten(0, x.shape[:2])
        return y[order.argsort()]

    @property
    def stand_in(self) -> StandIn:
        """The parameter, as code meets it."""
        return StandIn(self, (self.shape[0],), self._shape, last_is_k=not self.transposed)

    def __getitem__(self, index: int | Tensor) -> StandIn:
        return self.stand_in[index]

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.stand_in @ x

    def transpose(self, first: int, second: int) -> StandIn:
        """Swap N and K."""
        return self.stand_in.transpose(first, second)

    @property
    def mT(self) -> StandIn:
        """The same, N and K swapped."""
        return self.stand_in.mT

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = [each.stand_in if isinstance(each, FP4Experts) else each for each in args]
        return compute(function, given, kwargs or {})
