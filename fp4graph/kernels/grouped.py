"""Experts: any kernel's op, called for each expert on its own rows of x and its packed weight."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    Op = torch._ops.OpOverload[..., Tensor]

GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
"""What torch and transformers call `(x, weights, offs) -> y` of experts."""

_LIBRARY = torch.library.Library("fp4graph", "FRAGMENT")


@cache
def grouped(op: Op) -> Op:
    """Return `fp4graph::grouped_<op>(x, packed, offs) -> y`, the op of a kernel for experts.

    `packed` are the tensors that `op` takes between x and bias, stacked over experts. With `offs`,
    int [E], x is [M, K] and expert e has its rows from offs[e - 1] up to offs[e]; rows past the
    last are zeros in y. With None x is [E, M, K]. Reading `offs` waits for the device, as
    transformers' own loop does.
    """
    name = f"grouped_{op.name().partition('::')[2]}"
    _LIBRARY.define(f"{name}(Tensor x, Tensor[] packed, Tensor? offs) -> Tensor")

    def one(x: Tensor, packed: list[Tensor], expert: int) -> Tensor:
        return op(x, *(tensor[expert] for tensor in packed), None)

    def body(x: Tensor, packed: list[Tensor], offs: Tensor | None) -> Tensor:
        if offs is None:
            return torch.stack([one(rows, packed, expert) for expert, rows in enumerate(x)])
        ends = [0, *offs.tolist()]
        runs = [
            one(x[start:end], packed, expert)
            for expert, (start, end) in enumerate(pairwise(ends))
            if end > start
        ]
        nothing = one(x[:0], packed, 0)
        return torch.cat([*runs, nothing.new_zeros(len(x) - ends[-1], nothing.shape[-1])])

    def fake(x: Tensor, packed: list[Tensor], offs: Tensor | None) -> Tensor:
        return one(x, packed, 0)

    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fp4graph::{name}", fake, lib=_LIBRARY)
    made: Op = getattr(torch.ops.fp4graph, name).default
    return made
