"""Numbers of rows, followed through views without a value for each token.

The number of a value is a sum of one term a dimension: `qkv(x).view(B, T, H, 3, D)` has at
`[b, t, h, i, d]` the row `h * 3 * D + i * D + d`, which the first two have no part in. So a tensor
of numbers is kept as one column of terms a dimension, `None` where the dimension does not count,
and a view is followed column by column. Nothing grows with the number of tokens, which may be
unknown.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import map_arg

from fp4graph.graph.match import called

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Node

    Column = Tensor | None

_RESHAPES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "ravel"}
_EXPANDS = {"expand", "expand_as"}
_MOST = 1 << 22  # terms of a column, and values of what is copied and no view
# what stands for a size that is not known: primes, so that products tell what they are made of
_STAND_INS = (101, 103, 107, 109, 113, 127, 131, 137, 139, 149)


@dataclass(frozen=True)
class Numbering:
    """A tensor of row numbers.

    Invariant: the number at an index is `offset` plus, of each dimension that has a column, the
    term at that place, columns being repeated up to the dimension's size.

    Attributes:
        sizes: of the dimensions.
        columns: terms, int64, one column a dimension or None.
        offset: what all numbers have in common.
    """

    sizes: tuple[int, ...]
    columns: tuple[Column, ...]
    offset: int = 0

    @classmethod
    def of(cls, sizes: tuple[int, ...]) -> Numbering:
        """Number the last dimension."""
        last = torch.arange(sizes[-1], device="cpu")
        return cls(sizes, (*(None for _ in sizes[1:]), last))

    @property
    def rows(self) -> Tensor:
        """All numbers, int64 [R]."""
        if 0 in self.sizes:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        total = torch.tensor([self.offset], device="cpu")
        for column in self.columns:
            if column is not None:
                total = (total[:, None] + column).flatten().unique()
        return total

    def reshaped(self, sizes: tuple[int, ...]) -> Numbering | None:
        """Return the same numbers in another shape; None where they are no such sums there."""
        made = _Made([None] * len(sizes), self.offset)
        if 0 in self.sizes:
            return Numbering(sizes, tuple(made.columns))
        at, to = len(self.sizes), len(sizes)
        while at or to:
            before, after = at, to
            at, to = max(at - 1, 0), max(to - 1, 0)
            while (left := math.prod(self.sizes[at:before])) != math.prod(sizes[to:after]):
                if left < math.prod(sizes[to:after]):
                    at -= 1
                else:
                    to -= 1
                if at < 0 or to < 0:
                    return None
            column = _merged(self.sizes[at:before], self.columns[at:before])
            if column is not None and not made.split(column, sizes[to:after], to):
                return None
        return Numbering(sizes, tuple(made.columns), made.offset)

    def carriers(self) -> list[Tensor] | None:
        """Return for each column a tensor of the whole shape that no memory is needed for."""
        found = []
        for dim, column in enumerate(self.columns):
            if column is None:
                continue
            full = _full(column, self.sizes[dim])
            if full is None:
                return None
            alone = [1] * len(self.sizes)
            alone[dim] = -1
            found.append(full.view(alone).expand(self.sizes))
        return found or [torch.zeros((), dtype=torch.int64, device="cpu").expand(self.sizes)]


@dataclass
class _Made:
    """A numbering in the making."""

    columns: list[Column]
    offset: int = 0
    sizes: tuple[int, ...] = field(default=())

    def split(self, column: Tensor, sizes: Sequence[int], start: int) -> bool:
        """Give a merged column to the dimensions that it becomes; False where it is no sum."""
        if len(sizes) == 1:
            self.columns[start] = column
            return True
        full = _full(column, math.prod(sizes))
        if full is None:
            return False
        grid = full.view(tuple(sizes))
        total = first = grid[(0,) * len(sizes)]
        for dim in range(len(sizes)):
            place: list[Any] = [0] * len(sizes)
            place[dim] = slice(None)
            terms = grid[tuple(place)] - first
            shape = [1] * len(sizes)
            shape[dim] = -1
            total = total + terms.view(shape)
            if bool(terms.any()):
                self.columns[start + dim] = terms
        self.offset += int(first)
        return torch.equal(total.expand(grid.shape), grid)

    def add(self, values: Tensor, carrier: Tensor) -> bool:
        """Take in what became of a carrier; False where it varies along two dimensions."""
        is_view = values.untyped_storage().data_ptr() == carrier.untyped_storage().data_ptr()
        if values.numel() > _MOST and not is_view:
            return False
        self.sizes = tuple(values.shape)
        self.columns = self.columns or [None] * values.ndim
        if not values.numel():
            return True
        origin = values[(0,) * values.ndim]
        self.offset += int(origin)
        varies = [
            dim
            for dim, (size, stride) in enumerate(zip(values.shape, values.stride(), strict=True))
            if size > 1 and stride and (is_view or bool((values.narrow(dim, 0, 1) != values).any()))
        ]
        if len(varies) > 1:
            return False
        for dim in varies:
            place: list[Any] = [0] * values.ndim
            place[dim] = slice(None)
            terms, other = values[tuple(place)] - origin, self.columns[dim]
            self.columns[dim] = terms if other is None else terms + other
        return True


def view(node: Node, before: Numbering | tuple[Numbering, ...]) -> Any:
    """Return what a view makes of numbers, or of each of a tuple's; None where it is not known.

    Args:
        node: the view; its first argument has the numbers.
        before: those.
    """
    if isinstance(before, tuple):
        index = node.args[1] if called(node) == "getitem" else None
        return before[index] if isinstance(index, int) else None
    name = called(node)
    if name == "contiguous":
        return before
    if name in _RESHAPES:
        sizes = sizes_of(node)
        return None if sizes is None else before.reshaped(sizes)
    carriers = before.carriers()
    if carriers is None:
        return None
    try:
        results = [_run(node, carrier) for carrier in carriers]
    except (RuntimeError, IndexError, TypeError, KeyError, AttributeError, ValueError):
        return None
    if all(isinstance(each, Tensor) for each in results):
        return _together(results, carriers, before.offset)
    parts = [_together(each, carriers, before.offset) for each in zip(*results, strict=True)]
    return tuple(parts) if all(parts) else None


def _together(
    results: Sequence[Tensor], carriers: Sequence[Tensor], offset: int
) -> Numbering | None:
    made = _Made([], offset)
    if not all(map(made.add, results, carriers)):
        return None
    return Numbering(made.sizes, tuple(made.columns), made.offset)


def _run(node: Node, carrier: Tensor) -> Any:
    """Run a view on numbers."""
    if called(node) in _EXPANDS:
        sizes = sizes_of(node)
        return carrier.expand(sizes) if sizes else None

    def value(argument: Node) -> Any:
        if argument is node.args[0]:
            return carrier
        size = argument.meta["example_value"]
        if isinstance(size, Tensor):
            raise TypeError("its values are not known")
        return _size(size) if isinstance(size, int | torch.SymInt) else size

    args: Any = map_arg(node.args, value)
    kwargs: Any = map_arg(node.kwargs, value)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def sizes_of(node: Node) -> tuple[int, ...] | None:
    """Return the sizes of a node's value, stand-ins for those that are not known; None for none."""
    value = node.meta.get("example_value")
    if not isinstance(value, Tensor) or not value.ndim:
        return None
    return tuple(map(_size, value.shape))


def _size(size: Any) -> int:
    """Return a size as it is at this call, or what stands for one that depends on data."""
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    stand_ins = {
        symbol: _STAND_INS[sum(str(symbol).encode()) % len(_STAND_INS)]
        for symbol in size.node.expr.free_symbols
    }
    return int(size.node.expr.subs(stand_ins))


def _merged(sizes: Sequence[int], columns: Sequence[Column]) -> Column:
    """Return the column of several dimensions that become one; leading ones only repeat it."""
    merged: Column = None
    for size, column in zip(sizes, columns, strict=True):
        if merged is None:
            merged = column
            continue
        inner = torch.zeros(1, dtype=torch.int64, device="cpu") if column is None else column
        full = inner.repeat(size // len(inner))
        merged = (merged[:, None] + full).flatten()
    return merged


def _full(column: Tensor, size: int) -> Column:
    if size > _MOST:
        return None
    return column if len(column) == size else column.repeat(size // len(column))
