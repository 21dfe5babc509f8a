"""A GPU by torch's `cuda`, which is also AMD's.

Protocol of times: each call owns copies of one weight that together are several times the L2
cache, and is one CUDA graph that takes each copy once, as a model's layers do. A launch costs what
it costs in a graph, and nothing waits for Python. Rounds replay every call once, in an order that
rotates, between events of the device.
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

import fp4graph
from fp4graph.gpu_check.device import Call
from fp4graph.kernels import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    _Pool = list[tuple[torch.Tensor, ...]]

_CACHES = 6  # times the L2 cache that the copies of a weight take
_WARM_UPS = 3
_READ = 4096  # words in a program of the plain read
_PACKAGES = ("torch", "triton", "transformers", "torchao", "numpy")


class Cuda:
    """One GPU; see `Device`."""

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.target = target_of(where)

    def facts(self) -> dict[str, Any]:
        """See `Device`."""
        found = torch.cuda.get_device_properties(self.where)
        return {
            "gpu": found.name,
            "target": str(self.target),
            "multiprocessors": found.multi_processor_count,
            "memory": found.total_memory,
            "l2_cache": found.L2_cache_size,
            "gpus": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "fp4graph": fp4graph.__version__,
            **{name: _version(name) for name in _PACKAGES},
        }

    def read(self, nbytes: int) -> Call:
        """See `Device`."""
        words = -(-nbytes // 4 // _READ) * _READ
        data = torch.randint(1 << 30, (words,), dtype=torch.int32, device=self.where)
        sums = torch.empty(words // _READ, dtype=torch.int32, device=self.where)

        def run(each: torch.Tensor) -> None:
            _read[(len(sums),)](each, sums, SIZE=_READ)

        return Call("plain read", run, (data,))

    def times(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """See `Device`."""
        with torch.cuda.device(self.where), torch.no_grad():
            pools = {each.tensors: self._copies(each) for each in calls}  # some share a weight
            captured = [_Captured(each, pools[each.tensors]) for each in calls]
            for number in range(_WARM_UPS + rounds):
                turn = number % len(captured)
                for each in captured[turn:] + captured[:turn]:
                    each.replay()
        return [each.seconds[_WARM_UPS:] for each in captured]

    def _copies(self, call: Call) -> _Pool:
        cache = torch.cuda.get_device_properties(self.where).L2_cache_size
        copies = max(2, round(_CACHES * cache / call.nbytes))
        return [tuple(each.clone() for each in call.tensors) for _ in range(copies)]


class _Captured:
    """Calls in a CUDA graph, one for each copy of the weight."""

    def __init__(self, call: Call, pool: _Pool) -> None:
        self.seconds: list[float] = []
        self._pool = pool
        call.run(*self._pool[0])  # compiles
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._results = [call.run(*each) for each in self._pool]

    def replay(self) -> None:
        """Run all calls once and note the time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        self.seconds.append(start.elapsed_time(end) / 1e3 / len(self._pool))


@triton.jit  # type: ignore[untyped-decorator]
def _read(data: Any, sums: Any, SIZE: tl.constexpr) -> None:
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(data + at), axis=0))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
