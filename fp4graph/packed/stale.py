"""Before each call of a compiled graph: are its packed weights still those of the model?"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fp4graph.packed.cache import PackEntry

_PLACES = 8
_RUN = 8
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Binding:
    """A packed weight and the graph input that it must stay in step with."""

    index: int
    entry: PackEntry


class StaleCheck:
    """Packs again what changed since the last call.

    A weight may have changed when another tensor arrives in its place, or its version counter or
    data pointer moved. On CPUs it may also have changed when a probe differs: 8 places of 8 values,
    spread over its storage. (`peft` merges adapters through `.data`, which moves no counter.) Then
    every weight of the graph is compared in full.

    Args:
        bound: the packed weights of a graph, in step with their weights now.
        weights: those.
    """

    def __init__(self, bound: Sequence[Binding], weights: Sequence[Tensor]) -> None:
        self._bound = bound
        self._lock = threading.Lock()
        self._note(weights)

    def _note(self, weights: Sequence[Tensor]) -> None:
        self._seen = [
            (binding.index, ref(weight), weight._version, weight.data_ptr())
            for binding, weight in zip(self._bound, weights, strict=True)
        ]
        self._probe = Probe(weights)

    def __call__(self, args: Sequence[Any]) -> None:
        """Check the inputs of a call.

        Raises:
            WeightError: a changed weight holds NaN or Inf.
        """
        for index, weight, version, data_ptr in self._seen:
            given: Tensor = args[index]
            if weight() is not given or given._version != version or given.data_ptr() != data_ptr:
                break
        else:
            if not self._probe.differs():
                return
        with self._lock:
            weights = [args[binding.index] for binding in self._bound]
            for binding, weight in zip(self._bound, weights, strict=True):
                binding.entry.verify(weight)
            self._note(weights)


class Probe:
    """A few values of each of many tensors on the CPU, to be compared later, all in one go."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._samples: dict[tuple[torch.dtype, tuple[int, ...]], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.device.type == "cpu" and tensor.numel():
                # `.data` shares the storage and nothing else: a view would keep its parameter alive
                sample = _sample(tensor.data)
                self._samples.setdefault((sample.dtype, sample.shape), []).append(sample)
        self._values = self._read()

    def differs(self) -> bool:
        """Whether any value is another than when the probe was made."""
        return not all(map(torch.equal, self._values, self._read()))

    def _read(self) -> list[Tensor]:
        return [torch.cat(samples) for samples in self._samples.values()]


def _sample(tensor: Tensor) -> Tensor:
    """Return a view of some values as integers, where there are many [places, run]."""
    bits = tensor.view(_BITS[tensor.element_size()])
    count = bits.numel()
    if not _fills_its_storage(bits):
        steps = (slice(None, None, max(1, size // _RUN)) for size in bits.shape)
        return bits[tuple(steps)]
    if count < _PLACES * _RUN:
        return bits.as_strided((count,), (1,))
    return bits.as_strided((_PLACES, _RUN), ((count - _RUN) // (_PLACES - 1), 1))


def _fills_its_storage(tensor: Tensor) -> bool:
    """Whether the values lie without gaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def bind(
    run: Callable[..., Any], bound: Sequence[Binding], example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """Wrap a compiled graph so that each call first sees to it that no packed weight is stale."""
    if not bound:
        return run
    check = StaleCheck(bound, [example_inputs[binding.index] for binding in bound])

    def run_checked(*args: Any) -> Any:
        check(args)
        return run(*args)

    return run_checked
