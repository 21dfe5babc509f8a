"""What loading a packed model takes: memory of this process, and time.

    python bench/loading.py [--model qwen2.5-1.5b-random]

The checkpoint is written first, by another process, to bench's own folder.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

import fp4graph
from fp4graph import loading, models
from fp4graph.packed.linear import FP4Linear


def peak() -> int:
    """Return the highest resident memory of this process so far, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if "VmHWM" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-1.5b-random")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        models.load(options.model, torch.bfloat16).model.save_pretrained(options.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", options.model, "--write", folder]
        subprocess.run(command, check=True)
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        model = loading.load(folder, "all | lm_head")
        seconds = time.perf_counter() - start
    linears = [module for module in model.modules() if isinstance(module, FP4Linear)]
    packed = sum(each.nbytes for module in linears for each in module.buffers())
    dense = sum(row.bytes_dense for row in fp4graph.report_of(model).selected)
    now = psutil.Process().memory_info().rss
    print(f"linears {dense / 1e6:.0f} MB dense, {packed / 1e6:.0f} packed: {packed / dense:.3f}")
    print(f"process {before / 1e6:.0f} MB before, {now / 1e6:.0f} after, {peak() / 1e6:.0f} peak")
    print(f"{seconds:.1f} s, {dense / 1e6 / seconds:.0f} MB of dense weights a second")


if __name__ == "__main__":
    main()
