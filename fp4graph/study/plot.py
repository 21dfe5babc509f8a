"""The picture of an ablation: heat maps of roles by blocks, bars of roles, lines over blocks."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fp4graph import StudyError
from fp4graph.study.plot_style import (
    COLORS,
    HATCHES,
    MARKERS,
    color_scale,
    heat_map,
    in_model_order,
    legend_of,
    save,
    title_over,
    unit,
    unmeasured,
    width_of,
)
from fp4graph.study.selections import cell_of, kind_of
from fp4graph.study.views import is_nothing
from fp4graph.tables import cut_middle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.gridspec import GridSpec

    from fp4graph.study.trial import Row

    Setting = tuple[str, str, str]  # mode, quantizer, direction
    Panel = tuple[str, Setting, list[Row]]  # kind, setting, trials

_BARS = 40
_PANELS = 24
_LABEL = 36
_AXIS = "KL from dense, nats a token"
_ORDER = ("role,block", "role", "block", "other")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw the KL of every trial into a PNG, SVG or PDF.

    A panel for each kind of trials and each activation mode, quantizer and direction: formats stand
    beside each other in it. Single linears are heat maps of role by block, roles are bars, blocks
    are lines, and other selections are bars, the most damaging first.

    Raises:
        OptionError: the name ends otherwise.
        StudyError: there is no trial to draw; the file cannot be written.
    """
    panels = _panels(rows)
    if not panels:
        raise StudyError("there is no trial to draw")
    hidden = len(panels) - _PANELS
    panels = panels[:_PANELS]
    title += f"; {hidden} further panels are left out" if hidden > 0 else ""
    blocks = [1 + cell[1] for row in rows if (cell := cell_of(row.selector))]
    width = max([9.0, *(width_of(count) for count in blocks)])
    heights = [_height(kind, group) for kind, _, group in panels]
    figure = Figure(figsize=(width, 0.8 + sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for place, (kind, setting, group) in enumerate(panels):
        if kind == "role,block":
            _heat_maps(figure, grid, place, setting, group)
            continue
        axis = figure.add_subplot(grid[place])
        {"role": _roles, "block": _lines, "other": _bars}[kind](axis, group)
        axis.set_title(_said(kind, setting), fontsize=10)
    title_over(figure, title)
    save(figure, path)


def _panels(rows: Sequence[Row]) -> list[Panel]:
    found: dict[tuple[str, Setting], list[Row]] = defaultdict(list)
    for row in rows:
        if not row.is_dense:
            setting = row.activation_mode, row.quantizer, row.direction
            found[kind_of(row.selector), setting].append(row)
    return sorted(
        ((kind, setting, group) for (kind, setting), group in found.items()),
        key=lambda panel: _ORDER.index(panel[0]),
    )


def _formats(group: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.format or "" for row in group))


def _height(kind: str, group: Sequence[Row]) -> float:
    if kind == "role,block":
        roles = {cell[0] for row in group if (cell := cell_of(row.selector))}
        return (0.9 + 0.26 * len(roles)) * len(_formats(group))
    if kind == "other":
        return 1.0 + 0.26 * min(len(group), _BARS)
    return 2.8


def _said(kind: str, setting: Setting, format: str = "") -> str:
    mode, quantizer, direction = setting
    what = {"role": "this role", "block": "this block", "role,block": "this linear"}
    where = what.get(kind, "this selection")
    where = f"{where} only" if direction == "only" else f"all but {where}"
    how = " ".join(filter(None, (format, mode, "" if quantizer == "rtn" else quantizer)))
    return f"{how}, FP4 in {where}"


def _heat_maps(
    figure: Figure, grid: GridSpec, place: int, setting: Setting, group: Sequence[Row]
) -> None:
    formats = _formats(group)
    inner = grid[place].subgridspec(len(formats), 1)
    factor, name = unit(row.kl for row in group)
    scale = color_scale((row.kl for row in group), from_zero=setting[2] == "only")
    for number, format in enumerate(formats):
        axis = figure.add_subplot(inner[number])
        own = [row for row in group if row.format == format]
        found = {cell: row for row in own if (cell := cell_of(row.selector))}
        cells = {cell: row.kl for cell, row in found.items()}
        nothing = [cell for cell, row in found.items() if is_nothing(row.kl, row.kl_se)]
        heat_map(axis, cells, f"KL, {name}nats", scale, factor, nothing)
        axis.set_title(_said("role,block", setting, format) + unmeasured(cells), fontsize=10)


def _roles(axis: Axes, group: Sequence[Row]) -> None:
    formats, roles = _formats(group), in_model_order(row.selector for row in group)
    width = 0.8 / len(formats)
    for number, format in enumerate(formats):
        own = {row.selector: row for row in group if row.format == format}
        places = [place for place, role in enumerate(roles) if role in own]
        values = [own[roles[place]] for place in places]
        axis.bar(
            [place + (number - (len(formats) - 1) / 2) * width for place in places],
            [row.kl for row in values], width,
            yerr=[2 * (row.kl_se or 0.0) for row in values], capsize=2, ecolor="#555555",
            color=COLORS[number % 8], hatch=HATCHES[number % 8], edgecolor="white",
        )  # fmt: skip
    axis.set_xticks(range(len(roles)), roles)
    axis.set_xlabel("role (lines: two standard errors)")
    axis.set_ylabel(_AXIS)
    axis.set_ylim(bottom=0)
    axis.legend(handles=legend_of(formats), fontsize=8)


def _lines(axis: Axes, group: Sequence[Row]) -> None:
    for number, format in enumerate(_formats(group)):
        own = sorted(
            (int(row.selector.removeprefix("blocks=")), row.kl, row.kl_se or 0.0)
            for row in group
            if row.format == format
        )
        blocks, values, errors = zip(*own, strict=True)
        axis.errorbar(
            blocks, values, [2 * error for error in errors], label=format, capsize=2, markersize=4,
            color=COLORS[number % 8], marker=MARKERS[number % 8], linewidth=1,
        )  # fmt: skip
    axis.set_xlabel("block (lines: two standard errors)")
    axis.set_ylabel(_AXIS)
    axis.set_ylim(bottom=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)


def _bars(axis: Axes, group: Sequence[Row]) -> None:
    formats = _formats(group)
    shown = sorted(group, key=lambda row: -row.kl)[:_BARS]
    for place, row in enumerate(shown):
        number = formats.index(row.format or "")
        axis.barh(
            place, row.kl, xerr=2 * (row.kl_se or 0.0), capsize=2, ecolor="#555555",
            color=COLORS[number % 8], hatch=HATCHES[number % 8], edgecolor="white",
        )  # fmt: skip
    axis.set_yticks(range(len(shown)), [cut_middle(row.label, _LABEL) for row in shown])
    axis.invert_yaxis()
    axis.set_xlim(left=0, right=None if any(math.isfinite(r.kl) and r.kl for r in shown) else 1)
    left = len(group) - len(shown)
    more = f"; {left} less damaging ones are left out" if left else ""
    axis.set_xlabel(f"{_AXIS} (lines: two standard errors{more})")
    axis.set_ylabel("FP4 in")
    axis.legend(handles=legend_of(formats), fontsize=8)
