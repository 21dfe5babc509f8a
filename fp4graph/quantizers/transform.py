"""What a weight is multiplied by before it is rounded, and its input by the inverse of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4graph.formats.rotation import rotate


@dataclass(frozen=True, eq=False)
class Transform:
    """W x = (W T) (T^-1 x), for a T that makes both easier to round.

    Attributes:
        rotation: block of the Hadamard rotation that T is, its own inverse; 0 for none.
        smooth: float32 [K], the diagonal of T (SmoothQuant); None for ones.
    """

    rotation: int = 0
    smooth: Tensor | None = None

    def apply(self, w_NK: Tensor) -> Tensor:
        """Return W T, in float32 where T is not 1."""
        if self.smooth is not None:
            w_NK = w_NK.to(torch.float32) * self.smooth
        return rotate(w_NK.to(torch.float32), self.rotation) if self.rotation else w_NK

    def undo(self, w_NK: Tensor) -> Tensor:
        """Return W for W T."""
        if self.rotation:
            w_NK = rotate(w_NK, self.rotation)
        return w_NK if self.smooth is None else w_NK / self.smooth

    def divided(self, factor: Tensor | None) -> Transform:
        """Return the transform for a norm whose weight was multiplied by a factor, [K]."""
        if factor is None:
            return self
        smooth = factor.reciprocal() if self.smooth is None else self.smooth / factor
        return Transform(self.rotation, smooth)

    def of_input(self, x: Tensor) -> Tensor:
        """Return T^-1 x for inputs [..., K]."""
        x = x if self.smooth is None else x / self.smooth
        return rotate(x, self.rotation) if self.rotation else x

    def undo_input(self, x: Tensor) -> Tensor:
        """Return x for T^-1 x."""
        x = rotate(x, self.rotation) if self.rotation else x
        return x if self.smooth is None else x * self.smooth

    def of_hessian(self, mean_KK: Tensor) -> Tensor:
        """Return the mean of x x^T for the inputs T^-1 x."""
        if self.smooth is not None:
            mean_KK = mean_KK / self.smooth / self.smooth[:, None]
        if self.rotation:
            mean_KK = rotate(rotate(mean_KK, self.rotation).T, self.rotation)
        return mean_KK
