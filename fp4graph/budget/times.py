"""Microseconds of linears on this machine, by shape, scheme and number of rows; kept like trials.

Protocol: each variant owns copies of one weight that together outgrow the caches, and takes the
next copy at each call, as a model's layers do. Rounds run every variant of a shape once, in an
order that rotates; the median over rounds counts. Where a median is far above the least, the
machine was busy: such times are used, with a warning, and not kept.
"""

from __future__ import annotations

import logging
import math
import statistics
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fp4graph import Scheme, StudyError, quantize
from fp4graph.kernels import Problem, before, choose, target_of
from fp4graph.machine import processor
from fp4graph.quantizers import RTN
from fp4graph.timing import alternated, is_quiet, keep, kept, kept_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    Shape = tuple[int, int]
    Timed = dict[tuple[Shape, Scheme | None], float]

_POOL_BYTES = 128e6
_MOST_COPIES = 512
_LOG = logging.getLogger("fp4graph.budget")
_ROUNDS = 9


def times(
    shapes: Iterable[Shape],
    schemes: Sequence[Scheme | None],
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] = lambda: None,
) -> Timed:
    """Return the microseconds of a linear, for each shape and scheme.

    What was timed before on this machine, with these versions and as many threads, is read. A
    warning says where the machine was busy meanwhile.

    Args:
        shapes: (N, K) of weights.
        schemes: how they run; None for dense.
        rows: of the input.
        dtype: of inputs, results and dense weights.
        device: where they run.
        progress: is called after each shape.

    Raises:
        RefusalError: no kernel serves one.
        StudyError: the table cannot be written.
    """
    where = torch.device(device)
    file = _file(where)
    known = kept(file)
    found: Timed = {}
    for shape in dict.fromkeys(shapes):
        keys = {scheme: _key(shape, scheme, rows, dtype, where) for scheme in schemes}
        if not all(key in known for key in keys.values()):
            measured, quiet = _measure(shape, schemes, rows, dtype, where)
            known |= {keys[scheme]: us for scheme, us in measured.items()}
            if quiet:
                _keep(file, {keys[scheme]: us for scheme, us in measured.items()})
            else:
                _LOG.warning("the machine was busy while %s was timed: not kept", shape)
        found |= {(shape, scheme): known[key] for scheme, key in keys.items()}
        progress()
    return found


def _keep(file: Path, more: dict[str, float]) -> None:
    try:
        keep(file, more)
    except OSError as error:
        raise StudyError(f"cannot write {file}: {error}") from None


def _file(device: torch.device) -> Path:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return kept_file("times", name, device.type, torch.get_num_threads())


def _key(
    shape: Shape, scheme: Scheme | None, rows: int, dtype: torch.dtype, device: torch.device
) -> str:
    how = "dense"
    if scheme is not None:
        kernel = choose(_problem(shape, scheme, dtype, device), scheme.kernel)
        how = f"{scheme.format} {scheme.activations} @{scheme.rotation} {kernel.name}"
    return f"{shape[0]}x{shape[1]} {rows} {dtype} {how}"


def _problem(shape: Shape, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> Problem:
    return Problem(*shape, scheme.format, dtype, target_of(device), inputs=scheme.inputs)


def _measure(
    shape: Shape,
    schemes: Sequence[Scheme | None],
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[Scheme | None, float], bool]:
    """Return the median time of each scheme, and whether they all are near the least."""
    torch.manual_seed(0)
    w_NK = torch.randn(shape, device=device) / math.sqrt(shape[1])
    x_MK = torch.randn(rows, shape[1], device=device).to(dtype)
    calls = {scheme: _calls(w_NK, x_MK, scheme) for scheme in schemes}
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
    with torch.no_grad():
        taken = alternated([partial(_each, each) for each in calls.values()], _ROUNDS, wait)
    medians = {
        scheme: statistics.median(seconds) / len(calls[scheme]) * 1e6
        for scheme, seconds in zip(calls, taken, strict=True)
    }
    return medians, is_quiet(taken)


def _nothing() -> None:
    pass


def _each(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _calls(w_NK: Tensor, x_MK: Tensor, scheme: Scheme | None) -> list[Callable[[], Any]]:
    """Return a call for each copy of the weight."""
    if scheme is None:
        dense = w_NK.to(x_MK.dtype)
        return [_dense_call(x_MK, dense.clone()) for _ in range(_copies(dense.nbytes))]
    packed = quantize(w_NK, scheme.format, RTN)
    problem = _problem(packed.shape, scheme, x_MK.dtype, w_NK.device)
    kernel = choose(problem, scheme.kernel)
    op = kernel.op_for(problem)
    first = before(kernel, problem, scheme.rotation)
    found: list[Callable[[], Any]] = []
    for _ in range(_copies(packed.nbytes)):
        tensors = kernel.prepack(replace(packed, qdata=packed.qdata.clone()), problem)
        found.append(_packed_call(op, x_MK, tensors, first))
    return found


def _copies(nbytes: int) -> int:
    return min(max(2, round(_POOL_BYTES / nbytes)), _MOST_COPIES)


def _dense_call(x_MK: Tensor, w_NK: Tensor) -> Callable[[], Any]:
    return lambda: linear(x_MK, w_NK)


def _packed_call(
    op: Any, x_MK: Tensor, tensors: Sequence[Tensor], first: tuple[Any, ...] | None
) -> Callable[[], Any]:
    if first is None:
        return lambda: op(x_MK, *tensors, None)
    return lambda: op(first[0](x_MK, *first[1:]), *tensors, None)
