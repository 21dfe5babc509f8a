"""A model of 7B parameters, studied in 4 GB of memory: `--stream`.

    python bench/streamed.py [--folder DIR] [--model qwen2.5-7b-random] [--limit 4]

Writes random bfloat16 weights of the model's shapes into DIR, 15 GB, once. Then each command runs
in a memory cgroup (version 1 or 2, as root), file pages included: the kernel ends what needs more.
Random weights have no accuracy, so nothing is said of the numbers. A table of time, of the most
anonymous memory, and of what was read from disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fp4graph import models

GROUPS = Path("/sys/fs/cgroup")
TEXT = "--tokens", "64", "--seq-len", "32"
COMMANDS = {
    "outliers": ("outliers", *TEXT),
    "sensitivity": ("sensitivity", *TEXT, "--samples", "1"),
    "ablate": ("ablate", *TEXT, "--select", "down", "--select", "all"),
    "calibrate": ("calibrate", "--select", "v", "--samples", "2", "--seq-len", "32"),
}


def write(name: str, folder: Path) -> None:
    """Write a model with random weights, a file a block."""
    folder.mkdir(parents=True)
    hull = models.outline(name, torch.bfloat16).model
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for path, weight in hull.state_dict().items():
        where = "-".join(path.split(".")[:3])
        shards.setdefault(where, {})[path] = weight
    listed = {}
    for where, weights in shards.items():
        made = {
            path: torch.ones(weight.shape, dtype=weight.dtype)
            if weight.ndim == 1
            else torch.randn(weight.shape, dtype=weight.dtype) * weight.shape[-1] ** -0.5
            for path, weight in weights.items()
        }
        save_file(made, folder / f"{where}.safetensors", {"format": "pt"})
        listed |= dict.fromkeys(made, f"{where}.safetensors")
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hull.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    tokenizer = models.tokenizer_of(*models.locate(models.SMOLLM2))
    assert tokenizer is not None
    tokenizer.save_pretrained(folder)


def group(limit: int) -> Path:
    """Make a cgroup that holds so many bytes, file pages included."""
    old = (GROUPS / "memory").is_dir()
    folder = (GROUPS / "memory" if old else GROUPS) / "fp4graph-streamed"
    folder.mkdir(exist_ok=True)
    (folder / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    return folder


def field(file: Path, name: str) -> int:
    """Return a number of a process's from the kernel; 0 once it has ended."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, where they would be counted elsewhere."""
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measure(command: list[str], inside: Path) -> tuple[float, float, float]:
    """Run a command in a cgroup; return its seconds, most GB of its own, and GB read."""
    start = time.monotonic()
    enter = ["sh", "-c", f'echo $$ > {inside}/cgroup.procs; exec "$0" "$@"']
    child = subprocess.Popen([*enter, *command], stdout=subprocess.DEVNULL)
    proc = Path(f"/proc/{child.pid}")
    most = read = 0
    while child.poll() is None:
        most = max(most, field(proc / "status", "RssAnon") * 1024)
        read = max(read, field(proc / "io", "read_bytes"))
        time.sleep(0.1)
    if child.returncode:
        sys.exit(f"{' '.join(command)}: exit {child.returncode}")
    return time.monotonic() - start, most / 1e9, read / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="A model larger than memory.")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fp4graph-7b"))
    parser.add_argument("--model", default="qwen2.5-7b-random")
    parser.add_argument("--limit", type=float, default=4.0, help="GB")
    parser.add_argument("--command", choices=COMMANDS, action="append")
    options = parser.parse_args()
    if not options.folder.exists():
        write(options.model, options.folder)
    inside = group(int(options.limit * 1e9))
    fp4graph = str(Path(sys.executable).with_name("fp4graph"))
    out = {
        "ablate": ("--out", f"{options.folder}-out"),
        "calibrate": ("--out", f"{options.folder}-out.safetensors"),
    }
    print("| command | s | GB of its own, at most | GB read |\n|---|---|---|---|")
    for name in options.command or COMMANDS:
        command, *more = COMMANDS[name]
        call = [fp4graph, command, str(options.folder), *more, *out.get(name, ())]
        forget(options.folder)
        seconds, most, read = measure([*call, "--stream", "--dtype", "bfloat16"], inside)
        print(
            f"| `{' '.join([command, *more])}` | {seconds:.0f} | {most:.2f} | {read:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
