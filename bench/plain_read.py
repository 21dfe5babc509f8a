"""A plain read of memory: the roof of every kernel that reads weights once."""

from __future__ import annotations

import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp4graph.kernels.cpu.build import TORCH_ABI, find_compiler, torch_flags

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

SOURCE = Path(__file__).parent / "native/read.cpp"


@cache
def _op() -> Callable[[Tensor, int], Tensor]:
    include, link = torch_flags()
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "read.so"
        flags = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", *TORCH_ABI)
        command = [find_compiler(), *flags, *include, str(SOURCE), *link, "-o", str(built)]
        subprocess.run(command, check=True)
        torch.ops.load_library(str(built))
    return torch.ops.fp4graph_bench.read


def plain_read(sample: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the read with as many streams a thread as read a sample fastest."""
    op = _op()

    def seconds(streams: int) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            op(sample, streams)
            times.append(time.perf_counter() - start)
        return min(times)

    fastest = min((1, 8), key=seconds)
    return lambda x: op(x, fastest)
