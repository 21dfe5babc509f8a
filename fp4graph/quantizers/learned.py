"""Learned rounding: a block's codes by gradient, so that what the block gives errs least.

Needs no labels, for the target is what the dense model has after the block, and keeps all scales.
Values move by Adam's steps on a gradient that passes the rounding as if it were not there, in units
of the distance of two codes (as SignRound does, 2309.05516). What begins where GPTQ ended has a
short way to go. `bench/learned.py` says what it brings on text that has not been seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.quantizers.latents import Latents

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from fp4graph.formats import PackedWeight

    Error = Callable[[Mapping[str, Tensor], int], Tensor]

STEPS = 200
_REACH = 0.1  # how far a value would go that moved one way with the first step's length
_HELD = 0.49  # gaps from its code at most where a value begins
_CHECKED = 8  # batches that decide whether what was learned is better


def learn(
    weights: Mapping[str, Tensor],
    bases: Mapping[str, PackedWeight],
    error: Error,
    batches: int,
    steps: int = STEPS,
) -> dict[str, PackedWeight]:
    """Find codes for all linears of a block together.

    Args:
        weights: of the linears, [N, K] each, by path.
        bases: the same under the scales that are kept, with the codes to begin with.
        error: of the block's output, for weights by path and the number of a batch; gradients pass.
        batches: how many there are; one a step, over and over.
        steps: how often all codes move.

    Returns:
        the learned codes, or `bases` where they err less.
    """
    latents = {fqn: Latents(weights[fqn], base, _HELD, inside=True) for fqn, base in bases.items()}
    moved = [each.moved for each in latents.values()]
    optimizer = torch.optim.Adam(moved, lr=_REACH / steps, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)
    for step in range(steps):
        rounded = {fqn: each.rounded() for fqn, each in latents.items()}
        with torch.enable_grad():
            loss = error(rounded, step % batches)
        if not loss.requires_grad:
            return dict(bases)  # nothing that the block gives depends on these weights
        loss.backward()
        for fqn, each in latents.items():
            each.pull(rounded[fqn])
        optimizer.step()
        schedule.step()
    found = {fqn: each.packed() for fqn, each in latents.items()}
    return found if _total(found, error, batches) < _total(bases, error, batches) else dict(bases)


@torch.no_grad()
def _total(packed: Mapping[str, PackedWeight], error: Error, batches: int) -> float:
    rounded = {fqn: each.dequantize() for fqn, each in packed.items()}
    return sum(float(error(rounded, batch)) for batch in range(min(batches, _CHECKED)))
