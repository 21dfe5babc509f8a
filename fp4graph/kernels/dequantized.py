"""The kernel of CPUs without a native one: dequantise once, then a dense linear at each call.

It has the speed and the memory of a dense model, and says so in the report.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.kernels.contract import Kernel
from fp4graph.kernels.reference import READ, REFERENCE, define, packed_weight

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

    from fp4graph.formats import BlockFormat

_Key = tuple[torch.dtype, tuple[int, ...]]
_DENSE: MutableMapping[Tensor, tuple[_Key, Tensor]] = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def _body(format: BlockFormat) -> Callable[..., Tensor]:
    def body(x: Tensor, qdata: Tensor, *rest: Tensor) -> Tensor:
        *scales, bias = rest
        written = tuple(each._version for each in (qdata, *scales))
        key = (x.dtype, written)
        with _LOCK:
            known = _DENSE.get(qdata)
            if known is None or known[0] != key:
                packed = packed_weight(format, x.shape[-1], qdata, *scales)
                known = _DENSE[qdata] = (key, packed.dequantize(x.dtype))
        return linear(x, known[1], bias)

    return body


DEQUANTIZED = Kernel(
    name="dequantized",
    ops={base: define("dequantized", format, _body(format)) for base, format in READ.items()},
    prepack=REFERENCE.prepack,
    backends=("cpu",),  # elsewhere it would fill the device with dense weights
    refuses=lambda problem: "it keeps no experts" if problem.experts > 1 else None,
    unpack=REFERENCE.unpack,
    saves_memory=False,
    note="dequantised once, which saves no memory and no time",
)
