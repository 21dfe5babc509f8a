"""Pictures of an ablation: bars, and a heat map where every role was taken in every block."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from fp4graph.files import written_whole

mpl.use("Agg")  # before pyplot; there may be no screen
import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from fp4graph.study.trial import Row

_CELL = re.compile(r"(\w+),blocks=(\d+)")
_NO_NUMBER = float("nan")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the damage of every trial but the dense one into a PNG.

    One panel for each format, activation mode, quantizer and direction: a heat map of role by block
    if its selectors are of that form, else bars with standard errors.
    """
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.format is not None:
            kind = (row.format, row.activations.mode, row.quantizer, row.direction)
            panels.setdefault(kind, []).append(row)
    if any(_is_grid(group) for group in panels.values()):
        panels = {key: group for key, group in panels.items() if _is_grid(group)}
    height = max(_panel_height(group) for group in panels.values())
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 1 + height * len(panels)),
        sharex=True,  # so that formats compare by eye; panels of a heat map have the same blocks
        squeeze=False,
        layout="constrained",
    )
    for axis, (key, group) in zip(axes[:, 0], panels.items(), strict=True):
        format, mode, quantizer, direction = key
        mode += "" if quantizer == "rtn" else f" {quantizer}"
        (_heat_map if _is_grid(group) else _bars)(axis, group)
        where = "this selection only" if direction == "only" else "all but this selection"
        axis.set_title(f"{format} {mode}, FP4 in {where}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    with written_whole(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
    plt.close(figure)


def _is_grid(group: Sequence[Row]) -> bool:
    cells = [row for row in group if _CELL.fullmatch(row.selector)]
    return len(cells) > 1 and len(cells) >= len(group) - 1  # `all` may stand beside them


def _panel_height(group: Sequence[Row]) -> float:
    return 2.6 if _is_grid(group) else 0.6 + 0.28 * len(group)


def _bars(axis: Axes, group: Sequence[Row]) -> None:
    group = sorted(group, key=lambda row: row.dnll)
    values = [row.dnll for row in group]
    errors = [row.dnll_se or 0.0 for row in group]
    axis.barh(range(len(group)), values, xerr=errors, color="#4878a8", ecolor="#333333", capsize=3)
    axis.set_yticks(range(len(group)), [row.selector for row in group])
    axis.set_xlabel("NLL above the dense model's, nats (bars: standard error)")
    axis.axvline(0, color="#333333", linewidth=0.8)
    axis.margins(y=0.02)


def _heat_map(axis: Axes, group: Sequence[Row]) -> None:
    found = ((row, _CELL.fullmatch(row.selector)) for row in group)
    cells = {(m[1], int(m[2])): row.dnll for row, m in found if m}
    heat_map(axis, cells, "NLL above dense, nats")


def heat_map(axis: Axes, cells: Mapping[tuple[str, int], float], label: str) -> None:
    """Draw values by role and block, colours symmetric about 0."""
    roles = list(dict.fromkeys(role for role, _ in cells))
    blocks = sorted({block for _, block in cells})
    grid = np.array([[cells.get((r, b), _NO_NUMBER) for b in blocks] for r in roles])
    bound = float(np.nanmax(np.abs(grid))) or 1.0
    image = axis.imshow(grid, aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set_yticks(range(len(roles)), roles)
    step = max(1, len(blocks) // 16)
    axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    axis.set_xlabel("block")
    axis.figure.colorbar(image, ax=axis, label=label, shrink=0.9)
