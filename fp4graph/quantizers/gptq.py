"""GPTQ: each column's rounding error is made up for by the columns not yet rounded.

2210.17323, with the static activation reordering of 2509.23202 section 4: scales are fixed in the
columns' own order, columns are rounded from the largest input down, and lie where they were.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from scipy.linalg import lapack
from torch import Tensor

from fp4graph.errors import CalibrationError

if TYPE_CHECKING:
    from fp4graph.formats import PackedWeight

_LOG = logging.getLogger("fp4graph.calibrate")
BLOCK = 128
DAMPING = 0.01
_MOST_DAMPING = 1.0


def gptq(
    weight: Tensor,
    hessian: Tensor,
    base: PackedWeight,
    *,
    damping: float = DAMPING,
    name: str = "a weight",
) -> PackedWeight:
    """Round a weight so that the error of its output is small.

    Args:
        weight: [N, K].
        hessian: mean of x x^T, [K, K]; the computation is in its dtype, the inverse in float64.
        base: the weight under the scales to keep.
        damping: added to the diagonal, relative to its mean. Where the damped Hessian has no
            Cholesky factor it is raised tenfold, from 0 to the default, with a warning.
        name: of the weight, for that.

    Raises:
        CalibrationError: the Hessian holds NaN or Inf, or has no factor even with damping 1.
    """
    format = base.format
    codes_GN = base.scale_codes.T
    size = format.group_size(weight.shape[1])
    up_GN = format.scale_codec.reciprocal(codes_GN, base.per_tensor_scale)
    down_GN = format.scale_codec.decode(codes_GN, base.per_tensor_scale)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    root_KK = _inverse_root(hessian, order, damping, name)
    w_KN = weight.detach().to(hessian.dtype).T[order].contiguous()
    shape = (len(codes_GN) * size, len(weight))
    rounded_KN = torch.zeros(shape, dtype=torch.float32, device=weight.device)  # over their scales
    columns = order.tolist()
    for start in range(0, len(w_KN), BLOCK):
        end = min(start + BLOCK, len(w_KN))
        errors_BN = torch.empty_like(w_KN[start:end])
        for at in range(start, end):
            column = columns[at]
            group = column // size
            rounded_N = format.values.round((w_KN[at] * up_GN[group]).to(torch.float32))
            error_N = (w_KN[at] - rounded_N * down_GN[group]) / root_KK[at, at]
            w_KN[at + 1 : end].addr_(root_KK[at, at + 1 : end], error_N, alpha=-1)
            rounded_KN[column], errors_BN[at - start] = rounded_N, error_N
        w_KN[end:].addmm_(root_KK[start:end, end:].T, errors_BN, alpha=-1)
    return format.pack_codes(
        format.values.encode(rounded_KN.T), base.scale, base.per_tensor_scale, base.shape
    )


def _inverse_root(hessian: Tensor, order: Tensor, damping: float, name: str) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped, reordered Hessian.

    It is found in float64 by LAPACK in place, for such matrices are the most memory that is needed.
    """
    if not bool(hessian.isfinite().all()):
        raise CalibrationError(f"{name}: its inputs were NaN or Inf while calibrating")
    while True:
        h = hessian[order[:, None], order].double()
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1  # an input that is always zero: any code will do
        diagonal.add_(damping * diagonal.mean())
        root, failed = lapack.dpotrf(h.cpu().numpy().T, overwrite_a=True)
        if not failed:
            inverse, _ = lapack.dpotri(root, overwrite_c=True)
            root, failed = lapack.dpotrf(inverse, overwrite_a=True)
        if not failed:
            return torch.empty_like(hessian).copy_(torch.from_numpy(root))
        if damping >= _MOST_DAMPING:
            raise CalibrationError(f"{name}: its Hessian has no inverse even with damping 1")
        damping = min(10 * damping or DAMPING, _MOST_DAMPING)
        _LOG.warning("%s: its Hessian has no Cholesky factor: damping raised to %g", name, damping)
