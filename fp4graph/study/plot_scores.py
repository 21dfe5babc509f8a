"""Pictures of scores: by role and block, and beside what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from fp4graph.study.plot import heat_map

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Point = tuple[float, float, str]  # x, y, and what both belong to, such as a role

_COLUMNS = 4


def draw_cells(
    panels: Mapping[str, Mapping[tuple[str, int], float]], label: str, path: Path
) -> None:
    """Draw heat maps of role by block into a PNG, one below the other.

    Args:
        panels: values by role and block, by title.
        label: what they are.
        path: the file.
    """
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.6 + 2.6 * len(panels)), squeeze=False, layout="constrained"
    )
    for axis, (title, cells) in zip(axes[:, 0], panels.items(), strict=True):
        heat_map(axis, cells, label)
        axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_points(
    panels: Mapping[str, Sequence[Point]], label: str, path: Path, *, equal: bool
) -> None:
    """Draw what was measured over what should tell it into a PNG, both logarithmic.

    Args:
        panels: points by title; only those above zero can be shown.
        label: what was measured.
        path: the file.
        equal: whether both axes are the same quantity, so that the line of equality is drawn.
    """
    kinds = dict.fromkeys(kind for points in panels.values() for *_, kind in points)
    colors = {kind: f"C{index % 10}" for index, kind in enumerate(kinds)}
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (3.4 * columns + 1, 0.4 + 3.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        shown = [point for point in points if point[0] > 0 and point[1] > 0]
        for kind, color in colors.items():
            own = [(x, y) for x, y, each in shown if each == kind]
            if own:
                axis.scatter(*zip(*own, strict=True), s=9, color=color)
        axis.set(xscale="log", yscale="log", ylabel=label)
        axis.set_title(title, fontsize=9)
        if equal and shown:
            low = min(min(x, y) for x, y, _ in shown)
            axis.axline((low, low), (10 * low, 10 * low), color="#333333", linewidth=0.8)
    handles = [plt.Line2D([], [], marker="o", ls="", color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside right", fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
