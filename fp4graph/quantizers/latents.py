"""Weights that may lie between codes while they are trained; what is computed with is rounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp4graph.formats.minifloat import E2M1

if TYPE_CHECKING:
    from fp4graph.formats import PackedWeight


class Latents:
    """A weight over its scales, which are kept, and how far each value has moved.

    It is trained as if rounding were not there: `rounded` is a leaf, and `pull` takes its gradient.

    Args:
        weight: [N, K].
        base: the same under the scales that are kept, with the codes to begin with.
        reach: how far from its code a value may begin, in gaps between two codes; below a half.
        inside: whether that holds for all values too that round to their codes.

    Attributes:
        moved: float32 [N, Kp], in gaps; what an optimizer changes.
    """

    def __init__(self, weight: Tensor, base: PackedWeight, reach: float, *, inside: bool) -> None:
        self._base = base
        codec, size = base.format.scale_codec, base.format.group_size(base.shape[1])
        scale_NG = codec.decode(base.scale_codes, base.per_tensor_scale)
        self._scale_NK = scale_NG.repeat_interleave(size, 1)
        self._start_NK = self._start(weight, reach, inside=inside)
        self._gap_NK = _gap(self._start_NK)
        self.moved = torch.zeros_like(self._start_NK)

    def _start(self, weight: Tensor, reach: float, *, inside: bool) -> Tensor:
        w_NK = weight.detach().to(torch.float32)
        w_NK = pad(w_NK, (0, self._scale_NK.shape[1] - weight.shape[1]))
        code_NK = torch.where(self._scale_NK > 0, E2M1.decode(self._base.codes), 0.0)
        z_NK = torch.where(self._scale_NK > 0, w_NK / self._scale_NK, 0.0)
        reach_NK = reach * _gap(code_NK.abs() * (1 - 1e-6))  # the gap below, which is the smaller
        held_NK = code_NK + (z_NK - code_NK).clamp(-reach_NK, reach_NK)
        return held_NK if inside else torch.where(E2M1.round(z_NK) == code_NK, z_NK, held_NK)

    @property
    def _latent(self) -> Tensor:
        return self._start_NK + self._gap_NK * self.moved

    def rounded(self) -> Tensor:
        """Return the weight that the codes stand for now, [N, K]; it asks for a gradient."""
        w_NK = E2M1.round(self._latent).mul_(self._scale_NK)[:, : self._base.shape[1]]
        return w_NK.contiguous().requires_grad_()

    def pull(self, rounded_NK: Tensor) -> None:
        """Give `moved` the gradient of what `rounded` returned; zeros if nothing came of it."""
        self.moved.grad = torch.zeros_like(self.moved)
        if rounded_NK.grad is not None:
            K = rounded_NK.shape[1]
            per_gap_NK = self._gap_NK[:, :K] * self._scale_NK[:, :K]
            self.moved.grad[:, :K] = rounded_NK.grad * per_gap_NK

    def packed(self) -> PackedWeight:
        """Return the codes."""
        base = self._base
        codes_NK = E2M1.encode(self._latent)
        return base.format.pack_codes(codes_NK, base.scale, base.per_tensor_scale, base.shape)


def _gap(z: Tensor) -> Tensor:
    """Return how far codes are apart around a value."""
    magnitude = z.abs()
    return 2.0 ** ((magnitude >= 2).to(z.dtype) + (magnitude >= 4).to(z.dtype) - 1)
