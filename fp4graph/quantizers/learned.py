"""Learned rounding: a block's codes by gradient, so that what the block gives errs least.

Needs no labels, for the target is what the dense model has after the block, and keeps all scales.
Values move by Adam's steps on a gradient that passes the rounding as if it were not there, in units
of the distance of two codes (as SignRound does, 2309.05516). What begins where GPTQ ended has a
short way to go. `bench/learned.py` says what it brings on text that has not been seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4graph.formats.minifloat import E2M1

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fp4graph.formats import PackedWeight

    Error = Callable[[Mapping[str, Tensor], int], Tensor]

STEPS = 200
_REACH = 0.1  # how far a value would go that moved one way with the first step's length
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
    scales = {fqn: _scales(base) for fqn, base in bases.items()}
    start = {fqn: _start(weights[fqn], base, scales[fqn]) for fqn, base in bases.items()}
    moved = {fqn: torch.zeros_like(z_NK, requires_grad=True) for fqn, z_NK in start.items()}
    optimizer = torch.optim.Adam(list(moved.values()), lr=_REACH / steps, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1 / steps, steps)

    def latent(fqn: str) -> Tensor:
        return start[fqn] + _gap(start[fqn]) * moved[fqn]

    for step in range(steps):
        with torch.enable_grad():
            rounded = {fqn: _rounded(latent(fqn), scales[fqn], bases[fqn]) for fqn in bases}
            loss = error(rounded, step % batches)
        if not loss.requires_grad:
            return dict(bases)  # nothing that the block gives depends on these weights
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = {fqn: _packed(latent(fqn).detach(), bases[fqn]) for fqn in bases}
    return found if _total(found, error, batches) < _total(bases, error, batches) else dict(bases)


@torch.no_grad()
def _total(packed: Mapping[str, PackedWeight], error: Error, batches: int) -> float:
    rounded = {fqn: each.dequantize() for fqn, each in packed.items()}
    return sum(float(error(rounded, batch)) for batch in range(min(batches, _CHECKED)))


def _scales(base: PackedWeight) -> Tensor:
    """Return every value's scale, [N, K rounded up to whole groups]."""
    scale_NG = base.format.scale_codec.decode(base.scale_codes, base.per_tensor_scale)
    return scale_NG.repeat_interleave(base.format.group_size(base.shape[1]), 1)


def _start(weight: Tensor, base: PackedWeight, scale_NK: Tensor) -> Tensor:
    """Return the weight over its scales, moved to where it rounds to the base's codes."""
    w_NK = pad(weight.detach().to(torch.float32), (0, scale_NK.shape[1] - weight.shape[1]))
    code_NK = torch.where(scale_NK > 0, E2M1.decode(base.codes), 0.0)
    reach_NK = 0.49 * _gap(code_NK.abs() * (1 - 1e-6))  # the gap below, which is the smaller
    z_NK = torch.where(scale_NK > 0, w_NK / scale_NK, 0.0)
    return code_NK + (z_NK - code_NK).clamp(-reach_NK, reach_NK)


def _gap(z: Tensor) -> Tensor:
    """Return how far codes are apart around a value."""
    magnitude = z.abs()
    return 2.0 ** ((magnitude >= 2).to(z.dtype) + (magnitude >= 4).to(z.dtype) - 1)


def _rounded(z_NK: Tensor, scale_NK: Tensor, base: PackedWeight) -> Tensor:
    """Return rounded values whose gradient is the unrounded ones', [N, K]."""
    soft_NK = z_NK * scale_NK
    hard_NK = E2M1.round(z_NK.detach()) * scale_NK
    return (soft_NK + (hard_NK - soft_NK).detach())[:, : base.shape[1]]


def _packed(z_NK: Tensor, base: PackedWeight) -> PackedWeight:
    codes_NK = E2M1.encode(z_NK)
    return base.format.pack_codes(codes_NK, base.scale, base.per_tensor_scale, base.shape)
