"""What a linear's inputs look like: the mean of x x^T over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class Hessian:
    """The second moment of a linear's input, batch by batch.

    It is, up to a factor, the Hessian of the output's squared error by the weight, for each row.

    Args:
        in_features: K.

    Attributes:
        mean: of x x^T over the tokens seen, float32 [K, K].
        amax: largest magnitude of each column, float32 [K].
        tokens: rows seen.
    """

    def __init__(self, in_features: int) -> None:
        self.mean = torch.zeros(in_features, in_features)
        self.amax = torch.zeros(in_features)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs, [..., K]."""
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.float32)
        if len(x_MK) == 0:
            return
        before, self.tokens = self.tokens, self.tokens + len(x_MK)
        self.mean, self.amax = self.mean.to(x.device), self.amax.to(x.device)
        self.mean.addmm_(x_MK.T, x_MK, beta=before / self.tokens, alpha=1 / self.tokens)
        self.amax = torch.maximum(self.amax, x_MK.abs().amax(0))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Return the squared error of a linear's output over the output's own square.

    Args:
        weight: [N, K].
        rounded: what it became.
        hessian: mean of x x^T, [K, K].
    """
    wide = hessian.double()
    change = (rounded - weight).double()
    power = (weight.double() @ wide * weight).sum()
    return float((change @ wide * change).sum() / power.clamp_min(1e-300))
