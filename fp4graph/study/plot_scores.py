"""Pictures of scores: by role and block, and beside what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter
from scipy.stats import spearmanr

from fp4graph import StudyError
from fp4graph.study.plot_style import (
    COLORS,
    MARKERS,
    color_scale,
    heat_map,
    in_model_order,
    save,
    title_over,
    unit,
    unmeasured,
    width_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Point = tuple[float, float, str]  # x, y, and what both belong to, such as a role

_SPREADS = 8.0
_COLUMNS = 2
_FEWEST = 5


def draw_cells(
    panels: Mapping[str, Mapping[tuple[str, int], float]],
    label: str,
    title: str,
    path: Path,
    rows: str = "role",
) -> None:
    """Draw heat maps of role by block into a PNG, SVG or PDF, one below the other.

    Args:
        panels: values by role and block, none negative, by title.
        label: what they are.
        title: of the picture.
        path: the file.
        rows: what the rows are.

    Raises:
        OptionError: the file's name ends otherwise.
        StudyError: there is nothing to draw; the file cannot be written.
    """
    drawn = {name: cells for name, cells in panels.items() if cells}
    if not drawn:
        raise StudyError("there is no linear in a block to draw")
    blocks = 1 + max(block for cells in drawn.values() for _, block in cells)
    roles = max(len({role for role, _ in cells}) for cells in drawn.values())
    size = width_of(blocks), 0.8 + (1.0 + 0.26 * roles) * len(drawn)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(drawn), 1, squeeze=False)
    values = [value for cells in drawn.values() for value in cells.values()]
    factor, name = unit(values) if "nats" in label else (1.0, "")
    label = label.replace("nats", f"{name}nats")
    for axis, (heading, cells) in zip(axes[:, 0], drawn.items(), strict=True):
        heat_map(axis, cells, label, color_scale(values), factor, rows=rows)
        axis.set_title(heading + unmeasured(cells), fontsize=10)
    title_over(figure, title)
    save(figure, path)


def draw_points(
    panels: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    title: str,
    path: Path,
    *,
    equal: bool = False,
) -> None:
    """Draw what was measured over what should tell it into a PNG, SVG or PDF.

    Axes are logarithmic where values spread; the line is where both are equal.

    Args:
        panels: points by title; only those above zero can be shown.
        x_label: what should tell it, with its unit.
        y_label: what was measured, with its unit.
        title: of the picture.
        path: the file.
        equal: whether the sum of both is what is compared, so that no correlation is said.

    Raises:
        OptionError: the file's name ends otherwise.
        StudyError: there is nothing to draw; the file cannot be written.
    """
    if not panels:
        raise StudyError("nothing that was measured can be drawn beside these scores")
    kinds = in_model_order(kind for points in panels.values() for *_, kind in points)
    styles = {kind: (COLORS[n % 8], MARKERS[n % 8]) for n, kind in enumerate(kinds)}
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.8 * columns + 1.4, 0.6 + 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (heading, points) in zip(axes.flat, panels.items(), strict=False):
        shown = [point for point in points if point[0] > 0 and point[1] > 0]
        for kind, (color, marker) in styles.items():
            own = [(x, y) for x, y, each in shown if each == kind]
            if own:
                axis.scatter(*zip(*own, strict=True), s=18, color=color, marker=marker)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.tick_params(labelsize=8)
        _scale(axis, "x", [x for x, *_ in shown])
        _scale(axis, "y", [y for _, y, _ in shown])
        if not equal and len(shown) >= _FEWEST:
            rank = spearmanr([x for x, *_ in shown], [y for _, y, _ in shown]).statistic
            heading += f"\nrank correlation {rank:.2f}"
        axis.set_title(heading, fontsize=9)
        if shown:
            low = min(min(x, y) for x, y, _ in shown)
            high = max(max(x, y) for x, y, _ in shown)
            axis.plot([low, high], [low, high], color="#777777", linewidth=0.8, linestyle="--")
    handles = (
        []
        if len(styles) < 2
        else [
            Line2D([], [], marker=marker, ls="", color=color, label=kind)
            for kind, (color, marker) in styles.items()
        ]
    )
    if handles:
        figure.legend(handles=handles, loc="outside right", fontsize=9)
    title_over(figure, title)
    save(figure, path)


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
