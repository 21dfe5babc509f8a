"""Block-wise distillation: a block's codes and norms learn what the dense block gives.

It begins where GPTQ ended. Each step sees windows that no step before has seen, for what is learned
from few windows holds for them alone. Windows that are never trained on decide which state is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fp4graph.quantizers.latents import Latents

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from torch import Tensor

    from fp4graph.formats import PackedWeight

    Factors = Mapping[Hashable, Tensor]
    Error = Callable[[Mapping[str, Tensor], Factors, int], Tensor]

FEWEST_STEPS = 32
PER_STEP = 2
RATE = 0.02  # gaps between two codes a step, at most
NORM_RATE = 0.001  # of a norm's weight
_WARM_UP = 4
_BETAS = (0.9, 0.99)
_REACH = 0.42  # gaps from its code where a value begins that GPTQ has put elsewhere


class Distilled(NamedTuple):
    """What training has found.

    Attributes:
        packed: codes by path.
        factors: what each norm's weight is multiplied by, float32 [K].
    """

    packed: dict[str, PackedWeight]
    factors: dict[Hashable, Tensor]


def held_out(batches: int) -> int:
    """Return how many batches, the last ones, are not trained on."""
    return min(8, batches // 8 or batches // 2)


def distill(
    weights: Mapping[str, Tensor],
    bases: Mapping[str, PackedWeight],
    norms: Mapping[Hashable, int],
    error: Error,
    batches: int,
) -> Distilled:
    """Find codes for all linears of a block, and what its norms are multiplied by, together.

    Args:
        weights: of the linears, [N, K] each, by path.
        bases: the same under the scales that are kept, with the codes to begin with.
        norms: K of each norm that may change.
        error: of the block's output, for weights by path, factors of norms, and the number of a
            batch; gradients pass.
        batches: how many there are.

    Returns:
        the state that errs least on the windows that were held out; maybe what it began with.
    """
    latents = {
        fqn: Latents(weights[fqn], base, _REACH, inside=False) for fqn, base in bases.items()
    }
    device = next(iter(weights.values())).device
    factors = {key: torch.ones(K, device=device, requires_grad=True) for key, K in norms.items()}
    trained = max(1, batches - held_out(batches))
    held = range(trained, batches) or range(1)
    steps = max(FEWEST_STEPS, trained // PER_STEP)
    groups = [{"params": [each.moved for each in latents.values()], "lr": RATE}]
    if factors:
        groups.append({"params": list(factors.values()), "lr": NORM_RATE})
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1.0, (n + 1) / _WARM_UP) * (1 - n / steps)
    )
    best = Distilled(dict(bases), {key: each.detach().clone() for key, each in factors.items()})
    least = _total(best, error, held)
    for step in range(steps):
        rounded = {fqn: each.rounded() for fqn, each in latents.items()}
        for window in range(PER_STEP):
            with torch.enable_grad():
                loss = error(rounded, factors, (PER_STEP * step + window) % trained)
            if not loss.requires_grad:
                return best  # nothing that the block gives depends on these weights
            loss.backward()
        for fqn, each in latents.items():
            each.pull(rounded[fqn])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step + 1 in (steps // 2, 3 * steps // 4, steps):
            state = Distilled(
                {fqn: each.packed() for fqn, each in latents.items()},
                {key: each.detach().clone() for key, each in factors.items()},
            )
            total = _total(state, error, held)
            if total < least:
                best, least = state, total
    return best


@torch.no_grad()
def _total(state: Distilled, error: Error, held: Iterable[int]) -> float:
    rounded = {fqn: each.dequantize() for fqn, each in state.packed.items()}
    return sum(float(error(rounded, state.factors, batch)) for batch in held)
