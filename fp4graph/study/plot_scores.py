"""Pictures of scores: by role and block, and beside what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator, NullFormatter

from fp4graph.files import written_whole
from fp4graph.study.plot import heat_map

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Point = tuple[float, float, str]  # x, y, and what both belong to, such as a role

_SPREADS = 8.0


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
    with written_whole(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)


def draw_points(
    panels: Mapping[str, Sequence[Point]],
    label: str,
    path: Path,
    *,
    equal: bool = False,
    columns: int = 4,
) -> None:
    """Draw what was measured over what should tell it into a PNG, logarithmic where it spreads.

    Args:
        panels: points by title; only those above zero can be shown.
        label: what was measured.
        path: the file.
        equal: whether both axes are the same quantity, so that the line of equality is drawn.
        columns: panels in a row.
    """
    kinds = dict.fromkeys(kind for points in panels.values() for *_, kind in points)
    colors = {kind: f"C{index % 10}" for index, kind in enumerate(kinds)}
    columns = min(columns, len(panels))
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
        axis.set_ylabel(label)
        axis.tick_params(labelsize=7)
        _scale(axis, "x", [x for x, *_ in shown])
        _scale(axis, "y", [y for _, y, _ in shown])
        axis.set_title(title, fontsize=9)
        if equal and shown:
            low = min(min(x, y) for x, y, _ in shown)
            axis.axline((low, low), (10 * low, 10 * low), color="#333333", linewidth=0.8)
    handles = [plt.Line2D([], [], marker="o", ls="", color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside right", fontsize=8)
    with written_whole(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)


def _scale(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Make an axis logarithmic if its values spread, with few labels either way."""
    spreads = bool(values) and max(values) > _SPREADS * min(values)
    if spreads:
        axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    if spreads:
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(3))
