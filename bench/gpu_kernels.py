"""Times FP4 linears on a GPU against torch's own, cold weights, variants alternating.

    python bench/gpu_kernels.py [--shapes 14336x4096,...] [--rows 1,8,16] [--json FILE]

It is what `fp4graph gpu-check` times, on shapes, rows and kernels of your choice; the protocol is
that of `fp4graph/gpu_check/cuda.py`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from fp4graph.gpu_check.cuda import Cuda
from fp4graph.gpu_check.speed import ROWS, SHAPES, speeds
from fp4graph.gpu_check.told import table_of_speeds

SHAPES_TEXT = ",".join(f"{n}x{k}" for n, k in SHAPES)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES_TEXT, help="NxK,...")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--kernels", default="triton_fragments,triton")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="file for one JSON object a line")
    arguments = parser.parse_args()
    names = arguments.kernels.split(",")
    console = Console(width=120)
    device = Cuda(torch.device("cuda", 0))
    console.print(device.facts())
    for shape in arguments.shapes.split(","):
        n, k = map(int, shape.split("x"))
        for rows in map(int, arguments.rows.split(",")):
            found = list(
                speeds(
                    device, n, k, rows, dtype=getattr(torch, arguments.dtype),
                    takes=lambda kernel: kernel.name in names, rounds=arguments.rounds,
                )
            )  # fmt: skip
            console.print(table_of_speeds(found, f"{arguments.dtype}, weights cold"))
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.writelines(json.dumps(asdict(each)) + "\n" for each in found)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
