"""Where a Hadamard rotation helps FP4 and where it hurts, by the size of the group.

    python bench/rotation.py [MODEL] [--corpus FILE]

2509.23202 section 3 holds that values as they are look like Laplace's distribution and rotated
ones like the normal, and that rotation therefore hurts small groups and helps large ones; and that
without it the largest value of a group is kept exactly. Checked on both distributions, and by role
on the weights and inputs of a model. Writes the tables of docs/studies/rotation.md and its picture.

Rotations are as wide as the group; errors are those of the values as they were before.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import torch
from markdown import fill, table
from torch import Tensor

from fp4graph import MXFP4, NVFP4, LinearTap, TracedModel, models
from fp4graph.formats import rotate
from fp4graph.study.evaluate import cut

mpl.use("Agg")
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from fp4graph import BlockFormat

DOCS = Path(__file__).parents[1] / "docs"
SIZES = (8, 16, 32, 64, 128, 256)
SCALES = {"E4M3": NVFP4, "E8M0": MXFP4}
SAMPLES = 1 << 22
CLEAR = 0.005
ROWS = 128  # of each weight and each input, spread evenly

PAGE = DOCS / "studies/rotation.md"


@torch.no_grad()
def errors(x: Tensor, format: BlockFormat, *, rotated: bool) -> tuple[float, float]:
    """Return the relative squared error of all values, and of the largest in each group."""
    size = format.block_size
    x = x[:, : x.shape[1] // size * size]
    turned = rotate(x, size) if rotated else x
    rounded = format.fake_quantize(turned)
    change = (rotate(rounded, size) if rotated else rounded) - x
    groups, changes = x.reshape(-1, size), change.reshape(-1, size)
    top = groups.abs().argmax(1, keepdim=True)
    tops = groups.gather(1, top).double().square().sum()
    wrong = changes.gather(1, top).double().square().sum()
    power = x.double().square().sum()
    return float(change.double().square().sum() / power), float(wrong / tops)


def distributions() -> dict[str, Tensor]:
    """Draw from Laplace's and the normal distribution."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SAMPLES // 256, 256, generator=generator)
    uniform = torch.rand(SAMPLES // 256, 256, generator=generator) - 0.5
    return {"Laplace": -uniform.sign() * (1 - 2 * uniform.abs()).log(), "Normal": normal}


@torch.no_grad()
def tensors(model: str, corpus: str) -> dict[str, Tensor]:
    """Return rows of the weights and of the inputs of a model's block linears, by role."""
    loaded = models.load(model, torch.float32)
    windows = cut(models.corpus(corpus, 200_000), loaded.tokenizer, 512, 512)
    traced = TracedModel(loaded.model)
    traced(input_ids=windows.ids, use_cache=False)
    tap = LinearTap(traced)
    tap(input_ids=windows.ids, use_cache=False)
    weights: dict[str, list[Tensor]] = defaultdict(list)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    for tag, seen in tap.seen.items():
        if tag.is_block_linear:
            weights[f"weights of {tag.role}"].append(spread(seen.weight))
            inputs[f"inputs of {tag.role}"].append(spread(seen.x.flatten(0, -2)))
    found = {**weights, **inputs}
    same = {"inputs of k", "inputs of v", "inputs of up"}  # q's and gate's are the same
    return {name: torch.cat(rows) for name, rows in found.items() if name not in same}


def spread(x: Tensor) -> Tensor:
    """Return rows at even distances."""
    return x[:: max(1, len(x) // ROWS)][:ROWS]


def least_in_bold(values: list[float]) -> list[str]:
    """Write errors."""
    return [f"**{each:.5f}**" if each == min(values) else f"{each:.5f}" for each in values]


def main() -> None:
    parser = argparse.ArgumentParser(description="Where rotation helps FP4, by the group's size.")
    parser.add_argument("model", nargs="?", default=models.SMOLLM2)
    parser.add_argument("--corpus", default="pydoc")
    options = parser.parse_args()
    data = {**distributions(), **tensors(options.model, options.corpus)}
    found = {
        (scale, name, size, rotated): errors(x, replace(format, block_size=size), rotated=rotated)
        for scale, format in SCALES.items()
        for name, x in data.items()
        for size in SIZES
        for rotated in (False, True)
    }
    tables = []
    for scale in SCALES:
        rows = []
        for name in data:
            pairs = [[found[scale, name, size, r][0] for r in (False, True)] for size in SIZES]
            rows.append([name, *(cell for pair in pairs for cell in least_in_bold(pair))])
        head = [f"{scale}", *(text for size in SIZES for text in (str(size), f"{size} H"))]
        tables.append(table(head, rows))
    ratios = {
        (scale, name): [
            found[scale, name, s, True][0] / found[scale, name, s, False][0] for s in SIZES
        ]
        for scale in SCALES
        for name in data
    }
    crossovers = [[name, *(crossover(ratios[scale, name]) for scale in SCALES)] for name in data]
    tops = []
    for name in data:
        keys = [(k, name, f.block_size, r) for k, f in SCALES.items() for r in (False, True)]
        tops.append([name, *(f"{found[key][1]:.5f}" for key in keys)])
    parts = {
        "errors": "\n\n".join(tables),
        "crossover": table(("", *SCALES), crossovers),
        "tops": table(("", "E4M3", "E4M3 H", "E8M0", "E8M0 H"), tops),
    }
    fill(PAGE, parts)
    draw(ratios, DOCS / "images/rotation.png")


def crossover(ratios: list[float]) -> str:
    """Return the smallest size from which on all ratios are clearly below 1."""
    above = [index for index, ratio in enumerate(ratios) if ratio > 1 - CLEAR]
    first = above[-1] + 1 if above else 0
    return str(SIZES[first]) if first < len(SIZES) else "none"


def draw(ratios: dict[tuple[str, str], list[float]], path: Path) -> None:
    """Draw the error with rotation over the error without."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, scale in zip(axes, SCALES, strict=True):
        for name in (name for each, name in ratios if each == scale):
            style = "--" if "weights" in name else "-" if "inputs" in name else "k:"
            axis.plot(SIZES, ratios[scale, name], style, label=name)
        axis.axhline(1, color="#333333", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="group", title=f"{scale} scales")
        axis.set_xticks(SIZES, map(str, SIZES), minor=False)
    axes[0].set_ylabel("error with rotation / without")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
