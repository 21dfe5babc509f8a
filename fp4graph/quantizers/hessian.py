"""What a linear's inputs look like: the mean of x x^T over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from fp4graph.errors import CalibrationError


class Hessian:
    """The second moment of a linear's input, added up batch by batch.

    It is, up to a factor, the Hessian of the output's squared error by the weight, for each row.

    Args:
        in_features: K.

    Attributes:
        amax: largest magnitude of each column, float32 [K].
        tokens: rows seen.
    """

    def __init__(self, in_features: int) -> None:
        shape, cpu = (in_features, in_features), torch.device("cpu")
        self._sum_KK = torch.zeros(shape, dtype=torch.float32, device=cpu)
        self.amax = torch.zeros(in_features, dtype=torch.float32, device=cpu)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in inputs, [..., K]; what is kept lies on their device."""
        x_MK = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self._sum_KK, self.amax = self._sum_KK.to(x.device), self.amax.to(x.device)
        self._sum_KK.addmm_(x_MK.T, x_MK)
        if len(x_MK):
            self.amax = torch.maximum(self.amax, x_MK.abs().amax(0))
        self.tokens += len(x_MK)

    def check(self, name: str) -> None:
        """Check that codes can be found with it.

        Args:
            name: of the weight.

        Raises:
            CalibrationError: inputs were NaN or Inf, or too large for their squares.
        """
        if not bool(self._sum_KK.isfinite().all() & self.amax.isfinite().all()):
            raise CalibrationError(
                f"{name}: its inputs were NaN or Inf while calibrating, or beyond 1e19"
            )

    @property
    def mean(self) -> Tensor:
        """Mean of x x^T, float32 [K, K]."""
        return self._sum_KK / max(self.tokens, 1)


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
