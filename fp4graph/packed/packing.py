"""From a dense weight and a scheme to the packed weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fp4graph.errors import WeightError
from fp4graph.quantizers import matrix_name, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from fp4graph.formats import PackedWeight
    from fp4graph.scheme import Scheme


def pack(
    w_NK: Tensor,
    scheme: Scheme,
    fqn: str,
    *,
    expert: int | None = None,
    rows: Sequence[int] | None = None,
) -> PackedWeight:
    """Return the codes of a weight: a calibration's, or what the quantizer finds.

    Args:
        w_NK: the whole weight.
        scheme: how it runs.
        fqn: its linear.
        expert: which of a stack it is.
        rows: those that are wanted, ascending; None for all.

    Raises:
        WeightError: the weight holds NaN or Inf; names the linear.
        CalibrationError: the calibration has no codes for it.
    """
    index = None if rows is None else torch.tensor(rows, device=w_NK.device)
    if scheme.calibration is not None:
        name = matrix_name(fqn, expert)
        packed = scheme.calibration.get(name, w_NK, scheme.format, scheme.quantizer)
        packed = packed.to(w_NK.device)
        return packed if index is None else packed.rows(index)
    try:
        return quantize(w_NK if index is None else w_NK[index], scheme.format, scheme.quantizer)
    except WeightError as error:
        which = fqn if expert is None else f"{fqn}, expert {expert}"
        raise WeightError(f"{which}: {error}") from None
