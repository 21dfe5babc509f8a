"""Times ways to cut the fragment kernel's work on a GPU: what `mma/cut.py` was chosen by.

    python bench/gpu_cuts.py [--shapes 14336x4096,...] [--rows 1,8,16] [--json FILE]

`fp4graph gpu-check` goes from neighbour to neighbour; this tries all. Protocol: that of
`fp4graph/gpu_check/cuda.py`, each cut a call. They are compiled first, in --jobs processes that
fill Triton's cache. Printed are the fastest, with their time over that of today's choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import fp4graph
from fp4graph.formats import FP4_FORMATS
from fp4graph.gpu_check.cuda import Cuda
from fp4graph.gpu_check.device import Call
from fp4graph.gpu_check.speed import SHAPES
from fp4graph.kernels import target_of
from fp4graph.kernels.triton.mma import launch, layout
from fp4graph.kernels.triton.mma.cut import Cut, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

WARPS = ((1, 2), (2, 1), (1, 4), (2, 2), (4, 1))  # WN, WK


def cuts(rows: int, k: int) -> list[Cut]:
    """All cuts that make sense for a number of rows."""
    records = -(-k // layout.COLUMNS)
    tokens = next((each for each in (1, 2) if 8 * each >= rows), 4)
    found = []
    for tiles, (wn, wk), split in product((2, 4), WARPS, (1, 2, 4, 8, 16)):
        if records % wk == 0 and records >= wk * split:
            found.append(Cut(tokens, tiles, wn, wk, split, 0))
            if tiles == 4 and tokens <= 2:
                found.append(Cut(tokens, tiles, wn, wk, split, 4, 96 * tokens))
    return found


def caller(n: int, k: int, rows: int, name: str) -> tuple[Callable[..., object], list[Tensor]]:
    """Return call(tensors, cut) and a weight's tensors."""
    target = target_of(torch.device("cuda"))
    generator = torch.Generator("cuda").manual_seed(0)
    w = torch.randn(n, k, device="cuda", generator=generator) / k**0.5
    x = torch.randn(rows, k, device="cuda", generator=generator).bfloat16()
    order = layout.order_of(x.dtype, target)
    format = FP4_FORMATS[name]
    tensors = layout.pack(fp4graph.quantize(w, name), order)

    def call(each: tuple[Tensor, ...], cut: Cut) -> Tensor:
        return launch.linear(x, *each, None, order, format.block_size, target, cut=cut)

    return call, list(tensors)


def compile_cuts(job: tuple[int, int, int, str, list[Cut]]) -> None:
    """Run each once."""
    *problem, some = job
    call, tensors = caller(*problem)
    for cut in some:
        call(tensors, cut)
    torch.cuda.synchronize()


def call_cut(call: Callable[..., object], cut: Cut, *tensors: Tensor) -> object:
    return call(tensors, cut)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default=",".join(f"{n}x{k}" for n, k in SHAPES), help="NxK,...")
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--format", choices=list(FP4_FORMATS), default="nvfp4")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--best", type=int, default=8, help="how many to print")
    parser.add_argument("--json", type=Path, help="file for one JSON object a line")
    arguments = parser.parse_args()
    shapes = [tuple(map(int, each.split("x"))) for each in arguments.shapes.split(",")]
    problems = [
        (n, k, int(m), arguments.format) for n, k in shapes for m in arguments.rows.split(",")
    ]
    jobs = [
        (*problem, cuts(problem[2], problem[1])[part :: arguments.jobs])
        for problem in problems
        for part in range(arguments.jobs)
    ]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as processes:
        list(processes.map(compile_cuts, jobs))
    device = Cuda(torch.device("cuda", 0))
    for n, k, rows, name in problems:
        call, tensors = caller(n, k, rows, name)
        today = choose(rows, n, k, device.target)
        asked = list(dict.fromkeys((today, *cuts(rows, k))))
        calls = [Call(str(cut), partial(call_cut, call, cut), tuple(tensors)) for cut in asked]
        measured = device.times(calls, arguments.rounds)
        times = {
            cut: statistics.median(each) * 1e6 for cut, each in zip(asked, measured, strict=True)
        }
        print(f"{name} {n}x{k}, {rows} rows; today's: {times[today]:.2f} us, {today}")
        for cut in sorted(times, key=times.__getitem__)[: arguments.best]:
            print(f"    {times[cut]:7.2f} us  {times[today] / times[cut]:.2f} x  {cut}")
        if arguments.json:
            with arguments.json.open("a") as file:
                for cut, time in times.items():
                    line = {"shape": f"{n}x{k}", "rows": rows, "format": name, "us": time}
                    file.write(json.dumps({**line, **vars(cut)}) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
