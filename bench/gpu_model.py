"""Predicts what the Triton kernels take on GPUs, from what they compile to; it measures nothing.

    python bench/gpu_model.py [--shape 14336x4096] [--plot docs/images/gpu-model.png]

For each device, format and number of rows M, three times, of which the longest counts, as if all
else were hidden behind it:

    memory  bytes of weights, activations, results and workspace / read bandwidth
    issue   lane-instructions a weight (tests/kernels/machine_code.json) * N * K
            / (128 lanes * multiprocessors * clock), 64 for AMD
    tensor  2 M N K / tensor-core rate

Up to 32 rows (AMD: 64) share a reading of the weight. Above 128 it is unpacked (a write of 2
bytes a weight, then read again) and multiplied densely. The dense bfloat16 linear is the longer
of its memory and tensor times. Launches, starts of warps and tails of uneven work are left out, so
small shapes are slower.

On Hopper the kernel by wgmma is a line of its own, for its best tile. One more time counts there:

    L2      bytes of x and of the weight that all programs read / 5.5 TB/s, which is assumed
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fp4graph.kernels import Target, parse_target
from fp4graph.kernels.triton import tiles
from fp4graph.kernels.triton.mma.cut import MOST_ROWS, Cut, choose
from fp4graph.kernels.triton.mma.wgmma.tile import tiles_for

TABLE = Path(__file__).parents[1] / "tests/kernels/machine_code.json"
L2 = 5.5e12  # bytes a second, of H100 and H200
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
BYTES = {"nvfp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32}


@dataclass(frozen=True)
class Device:
    """A device by its vendor's figures, but for B200's bandwidth, which somebody measured.

    Attributes:
        target: as kernels see it.
        bandwidth: bytes of memory a second.
        clock: Hz.
        tensor: dense bfloat16 operations a second by the widest instruction.
        mma_sync: the same by `mma.sync`, which newer devices run at a part of that.
    """

    target: Target
    bandwidth: float
    clock: float
    tensor: float
    mma_sync: float

    @property
    def lanes(self) -> float:
        """Lane-instructions a second."""
        per_clock = 64 if self.target.backend == "hip" else 128
        return per_clock * self.target.multiprocessors * self.clock


def _device(
    name: str, terabytes: float, gigahertz: float, tensor: float, mma_sync: float
) -> Device:
    return Device(
        parse_target(name), terabytes * 1e12, gigahertz * 1e9, tensor * 1e12, mma_sync * 1e12
    )


# mma.sync on sm_90 at 62 % and on sm_100 at Ampere's rate a clock are assumptions.
DEVICES = {
    "A100": _device("cuda:sm_80", 2.04, 1.41, 312, 312),
    "H100": _device("cuda:sm_90", 3.35, 1.75, 989, 620),
    "H200": _device("cuda:sm_90", 4.8, 1.75, 989, 620),
    "B200": _device("cuda:sm_100", 5.91, 1.85, 2250, 560),
    "RTX 5090": _device("cuda:sm_120", 1.79, 2.41, 210, 210),
    "MI355": _device("hip:gfx950", 8.0, 2.4, 2500, 2500),
}
# bench/results/gpu_h200_2026-11-27.md: 14336 x 4096; F.linear / kernel
MEASURED = {1: 2.41, 8: 2.23, 16: 2.16, 32: 1.47, 64: 0.96, 128: 0.56, 257: 0.55, 4096: 0.95}
# flashinfer#4466: one B200, 19968 x 6656 for M = 1 and 32, 6656 x 19968 above; bf16 / kernel
PUBLISHED = {
    "FlashInfer CuTe-DSL NVFP4, B200": {1: 1.79, 32: 1.70, 128: 1.36, 512: 1.03, 1024: 0.98},
    "Marlin NVFP4, B200": {1: 1.54, 32: 1.16, 128: 0.56, 512: 0.34, 1024: 0.29},
}


@dataclass(frozen=True)
class Prediction:
    """Seconds by what they go to; the longest counts."""

    memory: float
    issue: float
    tensor: float
    before: float = 0.0
    l2: float = 0.0

    @property
    def seconds(self) -> float:
        """Of the whole call."""
        return self.before + max(self.memory, self.issue, self.tensor, self.l2)

    @property
    def binds(self) -> str:
        """What the time goes to."""
        return max(("memory", "issue", "tensor", "l2"), key=lambda each: getattr(self, each))


def launch_of(device: Device, M: int, N: int, K: int) -> tuple[int, int, str]:
    """Return the rows of x in a program, the split of sums, and how the launch's name starts."""
    if device.target.backend == "cuda":
        cut = choose(M, N, K, device.target)
        assert isinstance(cut, Cut)
        return 8 * cut.tokens, cut.split, f"multiply {{}} bfloat16 TOKENS={cut.tokens} "
    tile = tiles.choose(M, N, K, tiles.programs(device.target))
    return max(tile.rows, 1), tile.split, "gemm {} bfloat16" if tile.rows else "gemv {} bfloat16"


def dense(device: Device, M: int, N: int, K: int) -> Prediction:
    """Predict `F.linear` in bfloat16."""
    moved = 2 * N * K + 2 * M * (N + K)
    return Prediction(moved / device.bandwidth, 0, 2 * M * N * K / device.tensor)


def fp4(table: dict[str, Any], device: Device, format: str, M: int, N: int, K: int) -> Prediction:
    """Predict our kernel."""
    weights = BYTES[format] * N * K
    if (MOST_ROWS if device.target.backend == "cuda" else tiles.MOST_ROWS) < M:
        after = dense(device, M, N, K)
        unpacking = (weights + 2 * N * K) / device.bandwidth
        return Prediction(after.memory, 0, after.tensor, before=unpacking)
    rows, split, name = launch_of(device, M, N, K)
    passes = -(-M // rows)  # over the weight
    moved = passes * weights + 2 * M * (N + K)
    moved += 8 * split * M * N if split > 1 else 0  # raw sums, written and read
    lines = table[str(device.target)]
    launch = [value for key, value in lines.items() if key.startswith(name.format(format))]
    per_weight = max(each["per_weight"] for each in launch)
    issue = passes * per_weight * N * K / device.lanes
    return Prediction(moved / device.bandwidth, issue, 2 * passes * rows * N * K / device.mma_sync)


def wgmma(
    table: dict[str, Any], device: Device, format: str, M: int, N: int, K: int
) -> Prediction | None:
    """Predict the kernel by wgmma with its best tile; None where there is none."""
    weights, lines = BYTES[format] * N * K, table[str(device.target)]
    found = []
    for tile in tiles_for(M, N, K, device.target):
        passes = -(-M // tile.tokens)  # over the weight
        start = f"warpgroup_multiply {format} bfloat16 TOKENS={tile.tokens} BLOCKS={tile.blocks} "
        launch = [value for key, value in lines.items() if key.startswith(start)]
        per_weight = max(each["per_weight"] for each in launch)
        sums = 8 * tile.split * M * N if tile.split > 1 else 0
        programs = passes * -(-N // tile.rows) * tile.split
        busy = min(1, programs / device.target.multiprocessors)
        x_of_all = passes * -(-N // tile.rows) * 2 * tile.tokens * K
        found.append(
            Prediction(
                memory=(weights + 2 * M * (N + K) + sums) / device.bandwidth,
                issue=passes * per_weight * N * K / device.lanes / busy,
                tensor=2 * passes * tile.tokens * N * K / device.tensor / busy,
                l2=(x_of_all + passes * weights) / L2,
            )
        )
    return min(found, key=lambda each: each.seconds, default=None)


def print_tables(table: dict[str, Any], N: int, K: int) -> None:
    """Print one table a format."""
    console = Console(width=140)
    for format in BYTES:
        shown = Table(title=f"{format}, {N} x {K}, bfloat16: predicted, not measured")
        for column in ("device", "M", "dense us", "FP4 us", "binds", "dense / FP4"):
            shown.add_column(column, justify="left" if column in ("device", "binds") else "right")
        for name, device in DEVICES.items():
            for M in (1, 16, 64, 128, 256, 512, 4096):
                before = dense(device, M, N, K)
                ways = {
                    name: fp4(table, device, format, M, N, K),
                    f"{name}, wgmma": wgmma(table, device, format, M, N, K),
                }
                for way, after in ways.items():
                    if after is not None:
                        shown.add_row(
                            way, str(M), f"{before.seconds * 1e6:.1f}",
                            f"{after.seconds * 1e6:.1f}", after.binds,
                            f"{before.seconds / after.seconds:.2f}",
                        )  # fmt: skip
        console.print(shown)


def plot(table: dict[str, Any], N: int, K: int, path: Path) -> None:
    """Draw the speed-up over dense by M."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, device in DEVICES.items():
        ratios = [
            dense(device, M, N, K).seconds / fp4(table, device, "nvfp4", M, N, K).seconds
            for M in ROWS
        ]
        axes.plot(ROWS, ratios, marker=".", label=f"{name}, predicted")
    hopper = {M: wgmma(table, DEVICES["H200"], "nvfp4", M, N, K) for M in ROWS}
    ratios = {
        M: dense(DEVICES["H200"], M, N, K).seconds / way.seconds for M, way in hopper.items() if way
    }
    axes.plot(list(ratios), list(ratios.values()), ".--", label="H200 by wgmma, predicted")
    axes.plot(list(MEASURED), list(MEASURED.values()), "ko--", label="H200, measured")
    for label, points in PUBLISHED.items():
        axes.scatter(list(points), list(points.values()), marker="x", label=f"{label}, published")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.set(
        xscale="log", xlabel="rows M", ylabel="speed over dense bfloat16",
        title=f"NVFP4 W4A16, {N} x {K}: predicted, and measured on one",
    )  # fmt: skip
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="14336x4096", help="NxK")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    arguments = parser.parse_args()
    N, K = map(int, arguments.shape.split("x"))
    table = json.loads(TABLE.read_text())
    print_tables(table, N, K)
    if arguments.plot:
        plot(table, N, K, arguments.plot)


if __name__ == "__main__":
    main()
