"""SmoothQuant: channels whose inputs are large lend some of that to the weight (2211.10438).

W x = (W diag(s)) (x / s). Where x is what a norm's weight multiplies, x / s costs nothing: that
weight is divided by s in x's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

STRENGTH = 0.6
"""alpha, the best of 2509.23202 for FP4."""


def smoothing(amax_K: Tensor, weights: Sequence[Tensor], strength: float = STRENGTH) -> Tensor:
    """Return s, float32 [K]: max |x| ** alpha / max |W| ** (1 - alpha) of each channel.

    Args:
        amax_K: largest magnitude of each channel of the input.
        weights: of all linears that share it, [N, K] each.
        strength: alpha; 0 leaves the input as it is but for the weight's range, 1 evens it out.

    Returns:
        1 for a channel that is always 0, in the input or in the weights.
    """
    w_amax_K = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).to(torch.float32)
    s_K = amax_K.to(torch.float32) ** strength / w_amax_K ** (1 - strength)
    return torch.where((s_K > 0) & s_K.isfinite(), s_K, 1.0)
