"""Weights that are rounded as one: they share what a whole tensor has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from fp4graph.formats import PackedWeight


def together(
    weights: Sequence[Tensor], rounding: Callable[[Tensor], PackedWeight]
) -> list[PackedWeight]:
    """Round weights, [N, K] each with one K, as the rows of one; they share its per-tensor scale.

    Args:
        weights: what to round.
        rounding: rounds all rows.
    """
    whole = rounding(torch.cat(list(weights)))
    rows = torch.arange(whole.shape[0], device=whole.qdata.device)
    return [whole.rows(part) for part in rows.split([len(weight) for weight in weights])]
