"""What stands where models' own code reads a weight that is packed: it can be multiplied by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fp4graph.errors import RefusalError
from fp4graph.kernels.grouped import GROUPED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Index = int | Tensor | None

_MATMUL = {"matmul", "__matmul__", "mm", "bmm"}


class Multiplies(Protocol):
    """A module that owns a packed weight, or a stack of them."""

    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def times(self, x: Tensor, index: Index, bias: Tensor | None) -> Tensor | None:
        """Return x times the weight, or one of a stack, summed over K; None if shapes forbid."""

    def grouped(self, x: Tensor, offs: Tensor) -> Tensor | None:
        """Return each expert's rows of x [M, K] times its weight; None if it is no stack."""


class Multiplied:
    """What code that knows a tensor asks of a weight, of its `stand_in`."""

    if TYPE_CHECKING:

        @property
        def shape(self) -> torch.Size:
            """Of the dense weight."""

        @property
        def stand_in(self) -> StandIn:
            """The weight as code meets it."""

    @property
    def ndim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def transpose(self, first: int, second: int) -> StandIn:
        """Swap N and K."""
        return self.stand_in.transpose(first, second)

    def view(self, *shape: Any) -> StandIn:
        """Return the weight, if that is its shape."""
        return self.stand_in.view(*shape)

    reshape = view

    @property
    def mT(self) -> StandIn:
        """The same, N and K swapped."""
        return self.stand_in.mT

    T = mT

    def t(self) -> StandIn:
        """Swap N and K."""
        return self.stand_in.mT

    def __getitem__(self, index: object) -> StandIn:
        return self.stand_in[index]

    def __matmul__(self, x: Tensor) -> Tensor:
        return compute(torch.matmul, (self, x), {})

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(function, args, kwargs or {})


@dataclass(frozen=True)
class StandIn(Multiplied):
    """A packed weight as code meets it that knows the dense one: indexed, transposed, multiplied.

    torch's functions come here by `__torch_function__`. Nothing is computed before a product.

    Attributes:
        of: the module that owns the weight.
        stack: [E] of a stack of experts, [] of one weight.
        matrix: [N, K] as they are multiplied.
        last_is_k: whether the last dimension is K, and not N.
        index: of a stack, which expert, or each row's, int [S]; None for all of them.
    """

    of: Multiplies
    stack: tuple[int, ...]
    matrix: tuple[int, int]
    last_is_k: bool
    index: Index = None

    _is_hf_initialized = True  # transformers draws no weights at random here

    @property
    def stand_in(self) -> StandIn:
        """Itself."""
        return self

    @property
    def dtype(self) -> torch.dtype:
        """As of a tensor."""
        return self.of.dtype

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.of.device

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        stack = self.stack
        if self.index is not None:
            stack = tuple(self.index.shape) if isinstance(self.index, Tensor) else ()
        return torch.Size((*stack, *(self.matrix if self.last_is_k else self.matrix[::-1])))

    def __getitem__(self, index: object) -> StandIn:
        if self.stack and self.index is None:
            if isinstance(index, int):
                if not -self.stack[0] <= index < self.stack[0]:
                    raise IndexError(f"expert {index} of {self.stack[0]}")
                return replace(self, index=index)
            if isinstance(index, Tensor) and not index.is_floating_point() and index.ndim < 2:
                return replace(self, index=index)
        raise RefusalError("of packed weights only stacks can be indexed, by experts' numbers")

    def transpose(self, first: int, second: int) -> StandIn:
        """Swap N and K."""
        dims = self.ndim
        if {first % dims, second % dims} != {dims - 1, dims - 2}:
            raise RefusalError("of packed weights only the last two dimensions can be swapped")
        return self.mT

    @property
    def mT(self) -> StandIn:
        """The same, N and K swapped."""
        return replace(self, last_is_k=not self.last_is_k)

    def view(self, *shape: Any) -> StandIn:
        """Return the same, if that is its shape."""
        asked = torch.empty(self.shape, device="meta").view(*shape).shape
        if asked != self.shape:
            raise RefusalError(f"packed weights {list(self.shape)} cannot be seen as {list(asked)}")
        return self


def compute(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Multiply by packed weights as torch's functions do.

    Raises:
        RefusalError: another function, a product over N, or shapes that do not go together.
    """
    name = getattr(function, "__name__", str(function))
    given: list[Any] = [each.stand_in if isinstance(each, Multiplied) else each for each in args]
    y = None
    if name == "linear":
        x, weight, *rest = given
        y = _product(x, weight, kwargs.get("bias", rest[0] if rest else None), last_is_k=True)
    elif name in _MATMUL:
        x, weight = given
        if isinstance(x, StandIn):  # W @ x, of columns
            turned = weight[None] if weight.ndim == 1 else weight.mT
            y = _product(turned, x, None, last_is_k=True)
            y = y if y is None else y[0] if weight.ndim == 1 else y.mT
        else:
            y = _product(x, weight, None, last_is_k=False)
    elif name == "addmm":
        bias, x, weight = given
        y = None if kwargs else _product(x, weight, bias, last_is_k=False)
    elif name in GROUPED:
        x, weight, *rest = given
        offs = kwargs.get("offs", rest[0] if rest else None)
        if isinstance(weight, StandIn) and weight.index is None and not weight.last_is_k:
            y = weight.of.grouped(x, offs)
    if y is None:
        raise RefusalError(f"packed weights cannot be used so: {name}{_shapes(given)}")
    return y


def _product(x: Any, weight: Any, bias: Tensor | None, *, last_is_k: bool) -> Tensor | None:
    """Return x times a weight, summed over K; None where it is another product."""
    if not isinstance(x, Tensor) or not isinstance(weight, StandIn):
        return None
    fits = weight.last_is_k == last_is_k and x.shape[-1] == weight.matrix[1]
    return weight.of.times(x, weight.index, bias) if fits else None


def _shapes(args: Sequence[Any]) -> str:
    shapes = [str(list(each.shape)) for each in args if isinstance(each, Tensor | StandIn)]
    return f"({', '.join(shapes)})"
