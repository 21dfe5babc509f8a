"""Compile every shipped Triton launch for a GPU that is not here, and print what came of it.

    python machine_code.py cuda:sm_90       one JSON object a launch
    python machine_code.py --write          all targets, into machine_code.json

A process of its own a target: a failed assertion in the compiler ends the process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from kernels.offline import Catch, Facts, Launch, facts

import fp4graph
from fp4graph.formats import FORMATS, FP4_FORMATS
from fp4graph.kernels import Target, parse_target
from fp4graph.kernels.triton import launch, layout, tiles
from fp4graph.kernels.triton.mma import launch as mma
from fp4graph.kernels.triton.mma import layout as fragment_layout
from fp4graph.kernels.triton.mma.wgmma.tile import tiles_for

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE = Path(__file__).with_suffix(".json")
TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "cuda:sm_120", "hip:gfx942", "hip:gfx950")
_ROWS = {(14336, 4096): (1, 16, 32, 257), (896, 896): (1, 64)}  # by shape
_IMPLIED = ("HAS_BIAS", "ARCH", "LARGEST", "E4M3", "G", "BITS", "maxnreg")
_MATRIX = r"mma\.sync\.aligned|wgmma\.mma_async|tcgen05\.mma|v_mfma"


def launches(target: Target) -> Iterator[tuple[str, str, Launch]]:
    """Yield (name, dtype, launch) of each different launch of a few linears."""
    seen = set()
    for base, format in FORMATS.items():
        for dtype in (torch.bfloat16, torch.float16):
            for n, k in _ROWS:
                qdata, scale = format.shapes(n, k)
                packed = fp4graph.PackedWeight(
                    torch.zeros(qdata, dtype=torch.uint8),
                    torch.zeros(scale).to(format.scale_codec.dtype),
                    torch.ones(()) if format.has_per_tensor_scale else None,
                    (n, k),
                    format,
                )
                for each in _caught(packed, dtype, target):
                    constants = {
                        name: value
                        for name, value in each.keywords.items()
                        if name
                        not in ("HAS_BIAS", "ARCH", "LARGEST", "E4M3", "G", "BITS", "maxnreg")
                    }
                    about = " ".join(f"{key}={value}" for key, value in constants.items())
                    half = str(dtype).removeprefix("torch.")
                    name = f"{each.kernel.__name__} {base} {half} {about}"
                    if name not in seen:
                        seen.add(name)
                        yield name, half, each


def _caught(packed: fp4graph.PackedWeight, dtype: torch.dtype, target: Target) -> Iterator[Launch]:
    plain = layout.pack(packed)
    for rows in _ROWS[packed.shape]:
        catch = Catch()
        x = torch.zeros(rows, packed.shape[1], dtype=dtype)
        programs = tiles.programs(target)
        if rows != 32 and dtype == torch.bfloat16:  # the others are like these
            launch.linear(x, *plain, None, packed.format, programs=programs, run=catch)
        if target.backend == "cuda" and packed.format.base in FP4_FORMATS:
            _multiply(packed, plain[2], x, target, catch)
        yield from catch.launches


def _multiply(
    packed: fp4graph.PackedWeight,
    row_scale: torch.Tensor,
    x: torch.Tensor,
    target: Target,
    run: Any,
) -> None:
    order = fragment_layout.order_of(x.dtype, target)
    blocks = tuple(-(-size // by) for size, by in zip(packed.shape, (64, 128), strict=True))
    record = 1024 + 2048 // packed.format.block_size
    stream = torch.zeros((*blocks, record), dtype=torch.int32)
    tiles = [each for each in tiles_for(len(x), *packed.shape, target) if each.split <= 2]
    for cut in (None, *tiles):
        mma.linear(
            x, stream, row_scale, None, order, packed.format.block_size, target, cut=cut, run=run
        )


def report(name: str, half: str, each: Launch, target: Target) -> dict[str, Any]:
    """Compile a launch and return what the gate looks at."""
    found = facts(each.compile(target), target)
    line: dict[str, Any] = {
        "name": name,
        "registers": found.registers,
        "spilled": found.spilled,
        "shared": found.shared,
        "matrix": found.count(_MATRIX),
    }
    constants = each.keywords
    warps = constants.get("num_warps", 4)
    kind = each.kernel.__name__
    if kind == "multiply":
        weights = warps * 16 * constants["TILES"] * 128
        line["weight_loads"] = _wide_loads(found, ring=constants["RING"] > 0)
        x_bytes = found.count(r"ld\.global\.v4\.b32") * 512 * warps
        line["x_bytes_per_weight_byte"] = round(x_bytes / (weights * (0.5 + 1 / constants["G"])), 2)
    elif kind in ("gemm", "gemv"):
        weights = constants["BN"] * constants["BK"]
    elif kind == "warpgroup_multiply":
        line["serialized"] = len(found.serialized)
        warps, weights = 4, constants["BLOCKS"] * 64 * 128
    else:
        return line
    line["per_weight"] = round(found.per_weight(weights, warps), 2)
    return line


def _wide_loads(found: Facts, *, ring: bool) -> int:
    """How many loads of weights move 16 bytes a lane."""
    return found.count(r"cp\.async\.cg\.shared\.global" if ring else r"ld\.global\.cg\.v4\.b32")


def compile_all(target: Target) -> Iterator[dict[str, Any]]:
    """Yield the report of each launch."""
    for name, half, each in launches(target):
        yield report(name, half, each, target)


def table_of(target: str) -> dict[str, dict[str, Any]]:
    """Compile in a process of its own.

    Raises:
        AssertionError: it ended early; says after which launch.
    """
    done = subprocess.run(
        [sys.executable, __file__, target], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    last = lines[-1]["name"] if lines else "none"
    assert done.returncode == 0, f"{target}: died after {last}\n{done.stderr[-3000:]}"
    return {line.pop("name"): line for line in lines}


def main() -> None:
    if sys.argv[1] == "--write":
        table = {target: table_of(target) for target in TARGETS}
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        return
    for line in compile_all(parse_target(sys.argv[1])):
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
