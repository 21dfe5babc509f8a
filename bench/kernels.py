"""Times FP4 linears on this CPU against torch's own, cold weights, variants alternating.

    python bench/kernels.py [--shapes 18944x3584,...] [--rows 1,8,512] [--threads 2] [--isa NAME]

Protocol: each variant owns copies of one weight that together outgrow the caches, and takes the
next copy at each call, as a model's layers do (prefill, with many rows, uses one). Rounds run every
variant once, in an order that rotates; a plain read of as many bytes is one of them. Printed are
the best and the median time, the bytes of the weight over the median time, and, as medians over
rounds of paired ratios, the share of the read's bandwidth and the speed over F.linear in float32
and in bfloat16. Where llama-cpp-python is installed, ggml's MXFP4 is a variant too; it computes the
calls of a round as one graph, which starts its threads once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ggml
import torch
from plain_read import plain_read
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

import fp4graph
from fp4graph.kernels import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

QWEN2_5 = {
    "0.5B": ("896x896", "128x896", "4864x896", "896x4864"),
    "7B": ("3584x3584", "512x3584", "18944x3584", "3584x18944"),
}
POOL_BYTES = 400e6


@dataclass
class Variant:
    name: str
    round: Callable[[Tensor], object]  # one call for each copy of the weight
    copies: int
    dtype: torch.dtype
    weight_bytes: float
    times: list[float] = field(default_factory=list)


def each_copy(
    name: str,
    call: Callable[[Tensor, int], object],
    copies: int,
    dtype: torch.dtype,
    weight_bytes: float,
) -> Variant:
    def round(x: Tensor) -> None:
        for index in range(copies):
            call(x, index)

    return Variant(name, round, copies, dtype, weight_bytes)


def copies_of(nbytes: float, rows: int) -> int:
    return 1 if rows > 64 else max(2, round(POOL_BYTES / nbytes))


def packed_copies(w: Tensor, name: str, rows: int) -> list[tuple[Tensor, Tensor]]:
    packed = fp4graph.quantize(w, name)
    first = cpu.pack_tiles(packed)
    more = copies_of(first[0].nbytes, rows) - 1
    return [first, *(cpu.pack_tiles(packed) for _ in range(more))]  # as a model's layers lie


def fp4(name: str, ops: dict, w: Tensor, dtype: torch.dtype, rows: int, label: str) -> Variant:
    pool = packed_copies(w, name, rows)
    op = ops[name]

    def call(x: Tensor, i: int) -> Tensor:
        return op(x, *pool[i], None)

    return each_copy(label, call, len(pool), dtype, pool[0][0].nbytes)


def dense(w: Tensor, dtype: torch.dtype, rows: int) -> Variant:
    w = w.to(dtype)
    count = copies_of(w.nbytes, rows)
    pool = [w.clone() for _ in range(count)]
    name = f"F.linear {str(dtype).removeprefix('torch.')}"
    return each_copy(name, lambda x, i: linear(x, pool[i]), count, dtype, w.nbytes)


def int4(w: Tensor, rows: int) -> Variant:
    """torch's weight-only int4 (group 32, bfloat16): another format, the same purpose."""
    n, k = w.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.randn(k // 32, n, 2, dtype=torch.bfloat16)
    count = copies_of(packed.nbytes + scales.nbytes, rows)
    pool = [packed.clone() for _ in range(count)]
    op = torch.ops.aten._weight_int4pack_mm_for_cpu

    def call(x: Tensor, i: int) -> Tensor:
        return op(x, pool[i], 32, scales)

    nbytes = packed.nbytes + scales.nbytes
    return each_copy("torch int4 (bfloat16)", call, count, torch.bfloat16, nbytes)


def ggml_mxfp4(library: object, w: Tensor, rows: int) -> Variant:
    """ggml's MXFP4: the same format, activations rounded to 8 bits."""
    count = copies_of(w.numel() * 17 / 32, rows)
    linears = ggml.Linears(library, w, rows, count, torch.get_num_threads())
    return Variant("ggml mxfp4 (int8)", linears, count, torch.float32, linears.weight_bytes)


def read(w: Tensor, rows: int) -> Variant:
    """A plain read of NVFP4's bytes."""
    pool = packed_copies(w, "nvfp4", rows)
    op = plain_read(pool[0][0])
    nbytes = pool[0][0].nbytes
    return each_copy("plain read", lambda x, i: op(pool[i][0]), len(pool), torch.float32, nbytes)


def variants(n: int, k: int, rows: int) -> list[Variant]:
    w = torch.randn(n, k)
    float32, bfloat16 = torch.float32, torch.bfloat16
    found = [dense(w, float32, rows), dense(w, bfloat16, rows)]
    for name in cpu.CPU.ops:
        found.append(fp4(name, cpu.CPU.ops, w, float32, rows, f"{name} float32"))
        found.append(fp4(name, cpu.CPU.ops, w, bfloat16, rows, f"{name} bfloat16"))
        if name in cpu.CPU.int8_ops:
            found.append(fp4(name, cpu.CPU.int8_ops, w, float32, rows, f"{name} int8"))
    if k % 32 == 0 and n % 64 == 0:
        found.append(int4(w, rows))
    library = ggml.library()
    if library is not None and k % 32 == 0:
        found.append(ggml_mxfp4(library, w, rows))
    return [*found, read(w, rows)]


def measure(n: int, k: int, rows: int, rounds: int) -> list[Variant]:
    found = variants(n, k, rows)
    inputs = {dtype: torch.randn(rows, k).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for variant in found:
        variant.round(inputs[variant.dtype])
    for number in range(rounds):
        shift = number % len(found)
        for variant in found[shift:] + found[:shift]:
            x = inputs[variant.dtype]
            start = time.perf_counter()
            variant.round(x)
            variant.times.append((time.perf_counter() - start) / variant.copies)
    return found


def ratio(base: Variant, variant: Variant) -> float:
    return statistics.median(a / b for a, b in zip(base.times, variant.times, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default="18944x3584,4864x896", help="NxK,...; or all")
    parser.add_argument("--rows", default="1", help="rows of activations, M,...")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--isa", help="instruction set; the best if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    native = cpu.load()
    if not isinstance(native, cpu.Native):
        raise SystemExit(f"no native kernels: {native.reason}")
    native.use(arguments.isa)
    console = Console(width=140)
    console.print(f"{native.isa}, {arguments.threads} threads")
    shapes = arguments.shapes.split(",")
    if shapes == ["all"]:
        shapes = [shape for group in QWEN2_5.values() for shape in group]
    for shape in shapes:
        n, k = map(int, shape.split("x"))
        for rows in map(int, arguments.rows.split(",")):
            found = measure(n, k, rows, arguments.rounds)
            table = Table(title=f"{shape}, {rows} rows")
            for column in ("variant", "best us", "median us", "GB/s", "of read", "x f32", "x bf16"):
                table.add_column(column, justify="left" if column == "variant" else "right")
            for each in found:
                median = statistics.median(each.times)
                table.add_row(
                    each.name,
                    f"{min(each.times) * 1e6:.0f}",
                    f"{median * 1e6:.0f}",
                    f"{each.weight_bytes / median / 1e9:.1f}",
                    f"{ratio(found[-1], each) * each.weight_bytes / found[-1].weight_bytes:.0%}",
                    f"{ratio(found[0], each):.2f}",
                    f"{ratio(found[1], each):.2f}",
                )
            console.print(table)


if __name__ == "__main__":
    main()
