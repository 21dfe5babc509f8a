"""Times FP4 linears on a GPU against torch's own, cold weights, variants alternating.

    python bench/gpu_kernels.py [--shapes 14336x4096,...] [--rows 1,8,16] [--json FILE]

Protocol: each variant owns copies of one weight that together are several times the L2 cache, and
is one CUDA graph that multiplies by each copy once, as a model's layers do: a launch costs what it
costs in a graph, and nothing waits for Python. Rounds replay every variant once, in an order that
rotates, between events of the device; a plain read of as many bytes as NVFP4 has is one of them.
Printed are the median time of a call with its quartiles, the bytes of the weight over it, and, as
medians over rounds of paired ratios, the share of the read's bandwidth and the speed over F.linear.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

import fp4graph
from fp4graph.formats import FORMATS
from fp4graph.kernels import KERNELS, Kernel, Problem, refusals, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SHAPES = "4096x4096,1024x4096,14336x4096,4096x14336"  # Llama 3.1 8B: q o, k v, gate up, down
CACHES = 6  # times the L2 cache that the copies of a weight take
WARM_UPS = 3


@dataclass
class Variant:
    """Calls captured in a graph.

    Attributes:
        name: what it is.
        graph: calls once for each copy.
        copies: how many.
        weight_bytes: of one copy.
        keep: what the graph reads and writes.
        times: seconds of a call, by round.
    """

    name: str
    graph: torch.cuda.CUDAGraph
    copies: int
    weight_bytes: int
    keep: Any
    times: list[float] = field(default_factory=list)

    def replay(self) -> None:
        """Run all calls once and note the time."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        self.times.append(start.elapsed_time(end) / 1e3 / self.copies)


def copies_of(*weight: Tensor) -> list[tuple[Tensor, ...]]:
    """Copy a weight's tensors until they are far more than the cache holds."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, round(CACHES * cache / sum(each.nbytes for each in weight)))
    return [tuple(each.clone() for each in weight) for _ in range(copies)]


def capture(
    name: str, call: Callable[[tuple[Tensor, ...]], object], pool: list[tuple[Tensor, ...]]
) -> Variant:
    """Capture a call on each of `pool`, from `copies_of`."""
    call(pool[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(each) for each in pool]
    return Variant(name, graph, len(pool), sum(each.nbytes for each in pool[0]), (pool, results))


@triton.jit
def read_kernel(data, sums, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(data + at), axis=0))


def read(nbytes: int) -> Variant:
    """A plain read of as many bytes: the roof of whatever reads weights once."""
    size = 4096
    data = torch.randint(1 << 30, (-(-nbytes // 4 // size) * size,), dtype=torch.int32).cuda()
    sums = torch.empty(len(data) // size, dtype=torch.int32, device="cuda")

    def call(weight: tuple[Tensor, ...]) -> None:
        read_kernel[(len(sums),)](weight[0], sums, SIZE=size)

    return capture("plain read", call, copies_of(data))


def int4(x: Tensor, n: int, k: int) -> Variant:
    """torch's weight-only int4 (group 32): another format, the same purpose."""
    codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.randn(k // 32, n, 2, dtype=torch.bfloat16, device="cuda")
    op = torch.ops.aten._weight_int4pack_mm
    return capture("torch int4", lambda w: op(x, w[0], 32, w[1]), copies_of(packed, scales))


def fp4(kernel: Kernel, name: str, w: Tensor, x: Tensor) -> Variant:
    """One of our kernels."""
    problem = Problem(*w.shape, FORMATS[name], x.dtype, target_of(w.device))
    if refused := refusals(problem, [kernel]):
        raise SystemExit(f"{kernel.name}: {refused[0]}")
    packed = kernel.prepack(fp4graph.quantize(w, name), problem)
    op = kernel.ops[name]
    return capture(f"{name} {kernel.name}", lambda w: op(x, *w, None), copies_of(*packed))


def variants(n: int, k: int, rows: int, dtype: torch.dtype, names: list[str]) -> Iterator[Variant]:
    w = torch.randn(n, k, device="cuda") / k**0.5
    x = torch.randn(rows, k, device="cuda").to(dtype)
    yield capture("F.linear", lambda each: linear(x, each[0]), copies_of(w.to(dtype)))
    for name in FORMATS:
        for kernel in KERNELS:
            if kernel.name in names:
                yield fp4(kernel, name, w, x)
    if rows <= 64 and dtype == torch.bfloat16 and k % 128 == 0 and n % 8 == 0:
        yield int4(x, n, k)
    block = FORMATS["nvfp4"].block_size
    yield read(n * k // 2 + n * k // block)


def alternate(found: list[Variant], rounds: int) -> None:
    """Replay all, in an order that rotates; the first rounds do not count."""
    for number in range(WARM_UPS + rounds):
        shift = number % len(found)
        for variant in found[shift:] + found[:shift]:
            variant.replay()
    for variant in found:
        del variant.times[:WARM_UPS]


def row(variant: Variant, base: Variant, roof: Variant) -> dict[str, Any]:
    quartiles = statistics.quantiles(variant.times, n=4)
    speed = {
        name: statistics.median(a / b for a, b in zip(other.times, variant.times, strict=True))
        for name, other in (("read", roof), ("dense", base))
    }
    return {
        "variant": variant.name,
        "us": quartiles[1] * 1e6,
        "quartiles_us": [quartiles[0] * 1e6, quartiles[2] * 1e6],
        "gb_per_s": variant.weight_bytes / quartiles[1] / 1e9,
        "of_read": speed["read"] * variant.weight_bytes / roof.weight_bytes,
        "over_dense": speed["dense"],
    }


def print_table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("variant", "us", "quartiles", "GB/s", "of read", "x F.linear"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for each in rows:
        low, high = each["quartiles_us"]
        table.add_row(
            each["variant"], f"{each['us']:.1f}", f"{low:.1f} to {high:.1f}",
            f"{each['gb_per_s']:.0f}", f"{each['of_read']:.0%}", f"{each['over_dense']:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="NxK,...")
    parser.add_argument("--rows", default="1,8,16,32,64,128,256,512,4096")
    parser.add_argument("--kernels", default="triton_fragments,triton")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="file for one JSON object a line")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}")
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for rows in map(int, arguments.rows.split(",")):
            names = arguments.kernels.split(",")
            found = list(variants(n, k, rows, getattr(torch, arguments.dtype), names))
            alternate(found, arguments.rounds)
            lines = [row(each, found[0], found[-1]) for each in found]
            print_table(console, f"{shape}, {rows} rows", lines)
            if arguments.json:
                with arguments.json.open("a") as file:
                    for line in lines:
                        file.write(json.dumps({"shape": shape, "rows": rows, **line}) + "\n")
            del found
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
