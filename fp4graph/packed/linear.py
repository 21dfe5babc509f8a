"""A linear that owns its packed weight: what `convert` puts in the place of a dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fp4graph.packed.module import PackedModule
from fp4graph.packed.stand_in import StandIn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fp4graph.formats import PackedWeight
    from fp4graph.packed.stand_in import Index
    from fp4graph.scheme import Scheme


class FP4Linear(PackedModule):
    """Computes `F.linear(x, packed.dequantize(x.dtype), bias)` by the kernel that suits its device.

    Args:
        packed: the weight.
        scheme: how it runs.
        dtype: of inputs and results.
        bias: [N], or None.
        smooth: as in `PackedModule`.
        rows: of a fused weight the rows that `packed` has, ascending; None for all.
        rest: the dense linear of the other rows.
        transposed: whether the dense weight was stored [K, N].
        prepare: as in `PackedModule`.
    """

    places: Tensor

    def __init__(
        self,
        packed: PackedWeight,
        scheme: Scheme,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        smooth: Tensor | None = None,
        rows: Sequence[int] | None = None,
        rest: nn.Linear | None = None,
        *,
        transposed: bool = False,
        prepare: bool = True,
    ) -> None:
        N, K = packed.shape
        N += 0 if rest is None else rest.out_features
        facts = (packed.shape, torch.Size((K, N) if transposed else (N, K)), scheme, dtype, smooth)
        super().__init__([packed], *facts, stacked=None, prepare=prepare)
        self.out_features, self.in_features = N, K
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.rest = rest
        self._transposed = transposed
        if rest is not None:
            assert rows is not None
            others = sorted(set(range(self.out_features)) - set(rows))
            self._places = torch.tensor([*rows, *others], device="cpu").argsort().tolist()
            self._find_places()

    @property
    def stand_in(self) -> StandIn:
        """The weight as code meets it; its values are `packed.dequantize()`."""
        shape = self.out_features, self.in_features
        return StandIn(self, (), shape, last_is_k=not self._transposed)

    weight = stand_in

    @property
    def packed(self) -> PackedWeight:
        """The weight in the plain layout."""
        return self.weights()[0]

    def prepare(self) -> None:
        """See the base class."""
        super().prepare()
        self._find_places()

    def _find_places(self) -> None:
        if self.rest is not None and self.device.type != "meta":
            places = torch.tensor(self._places, device=self.device)
            self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [..., K] times the weight, [..., N]."""
        return self._computed(x, self.bias, None if self.rest is None else self.rest.bias)

    def times(self, x: Tensor, index: Index, bias: Tensor | None) -> Tensor:
        """See `Multiplies`."""
        if bias is None or self.rest is None:
            return self._computed(x, bias, None)
        return self._computed(x, None, None) + bias

    def grouped(self, x: Tensor, offs: Tensor) -> None:
        """It is no stack."""

    def _computed(self, x: Tensor, bias: Tensor | None, other: Tensor | None) -> Tensor:
        y: Tensor = self._op()(self._taken(x), *self._tensors(), bias)
        if self.rest is None:
            return y
        dense = linear(x, self.rest.weight, other)
        return torch.cat((y, dense), -1).index_select(-1, self.places)
