"""Packed weights, once for each parameter and scheme, kept in step with the parameter."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.fingerprint import fingerprint
from fp4graph.packed.packing import pack

if TYPE_CHECKING:
    from collections.abc import MutableMapping

    from fp4graph.kernels import Kernel, Problem
    from fp4graph.scheme import Scheme


@dataclass(eq=False)
class PackEntry:
    """The packed form of one weight; every graph that uses the weight holds the same tensors.

    Of a stack of experts, each is packed for itself, and the tensors are stacked.
    A changed weight is packed again into them, so compiled graphs stay valid.
    """

    scheme: Scheme
    kernel: Kernel
    problem: Problem
    transposed: bool
    rows: tuple[int, ...] | None
    fqn: str
    tensors: tuple[Tensor, ...] = ()
    index: tuple[Tensor, ...] = ()  # the rows as a tensor, where they are not all
    _weight: ref[Tensor] | None = None
    _version: int = -1
    _data_ptr: int = -1
    _fingerprint: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def verify(self, weight: Tensor) -> None:
        """Pack again if `weight` is not what was packed; every value counts.

        Raises:
            WeightError: the weight holds NaN or Inf; names the linear.
        """
        if (
            self._weight is None
            or self._weight() is not weight
            or weight._version != self._version
            or weight.data_ptr() != self._data_ptr
            or fingerprint(weight) != self._fingerprint
        ):
            self._pack(weight)

    def refresh(self) -> None:
        """Verify the weight that was packed last, if it still lives."""
        weight = None if self._weight is None else self._weight()
        if weight is not None:
            self.verify(weight)

    def _pack(self, weight: Tensor) -> None:
        # Outside inference mode, or the tensors could not be written again later.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            w_NK = weight.detach().mT if self.transposed else weight.detach()
            if self.rows is not None:
                self.index = self.index or (torch.tensor(self.rows, device=w_NK.device),)
            if w_NK.ndim == 3:
                experts = (self._prepack(each, expert) for expert, each in enumerate(w_NK))
                fresh = tuple(map(torch.stack, zip(*experts, strict=True)))
            else:
                fresh = self._prepack(w_NK)
            if self.tensors:
                for old, new in zip(self.tensors, fresh, strict=True):
                    old.copy_(new)
            else:
                self.tensors = tuple(tensor.contiguous() for tensor in fresh)
            self._weight = ref(weight)
            self._version = weight._version
            self._data_ptr = weight.data_ptr()
            self._fingerprint = fingerprint(weight)

    def _prepack(self, w_NK: Tensor, expert: int | None = None) -> tuple[Tensor, ...]:
        packed = pack(w_NK, self.scheme, self.fqn, expert=expert, rows=self.rows)
        return self.kernel.prepack(packed, self.problem)


class PackCache:
    """Entries by weight identity and by how they are packed; a weight that dies takes its entries.

    Shared by all graphs, shapes, backends and tied uses of a weight.
    """

    def __init__(self) -> None:
        self._entries: MutableMapping[Tensor, dict[object, PackEntry]] = WeakIdKeyDictionary()
        self._lock = threading.Lock()

    def get(
        self,
        weight: Tensor,
        scheme: Scheme,
        kernel: Kernel,
        problem: Problem,
        *,
        transposed: bool,
        fqn: str,
        rows: tuple[int, ...] | None = None,
    ) -> PackEntry:
        """Return the entry of a weight, or of some of its rows, packed now if new or changed.

        Raises:
            WeightError: the weight holds NaN or Inf; names the linear.
        """
        layout = kernel.plan(problem).layout
        how = scheme.calibration or scheme.quantizer
        key = (scheme.format, how, kernel.name, layout, transposed, rows)
        with self._lock:
            by_scheme = self._entries.get(weight)
            if by_scheme is None:
                by_scheme = self._entries[weight] = {}
            entry = by_scheme.get(key)
            if entry is None:
                entry = PackEntry(scheme, kernel, problem, transposed, rows, fqn)
                by_scheme[key] = entry
            entry.verify(weight)
        return entry

    def forget(self, weight: Tensor) -> None:
        """Drop what a weight was packed into; who holds it keeps it."""
        with self._lock:
            self._entries.pop(weight, None)

    def __len__(self) -> int:
        return sum(map(len, self._entries.values()))


CACHE = PackCache()
"""The process's packed weights."""
