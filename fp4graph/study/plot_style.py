"""What all pictures share: colours that everybody tells apart, heat maps, files."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fp4graph import OptionError, StudyError
from fp4graph.files import written_whole
from fp4graph.linears.tags import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Cells = Mapping[tuple[str, int], float]

ENDINGS = (".png", ".svg", ".pdf")
COLORS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#F0E442", "#CC79A7", "#009E73")
"""Okabe and Ito's, which the red-green-blind tell apart, in an order that prints well too."""
MARKERS = "osD^vPX*"
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo", "--")
MAP = "YlGnBu"
UNMEASURED = "////"
_DPI = 120
_WIDEST = 18.0  # inches
_CELL = 0.46  # inches that a number in a cell takes
_MARGIN = 2.6  # inches for names and colour bar
_SPREAD = 20.0  # of values, from which on colours go by their logarithm


def check_ending(path: Path) -> None:
    """Check that a picture's name says a format that can be drawn.

    Raises:
        OptionError: it does not.
    """
    if path.suffix.lower() not in ENDINGS:
        raise OptionError(f"{path}: expected a name that ends with {', '.join(ENDINGS)}")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        OptionError: see `check_ending`.
        StudyError: the file cannot be written.
    """
    check_ending(path)
    try:
        with written_whole(path) as draft:
            figure.savefig(draft, dpi=_DPI, format=path.suffix.lower().removeprefix("."))
    except OSError as error:
        raise StudyError(f"cannot write {path}: {error.strerror or error}") from None


def title_over(figure: Figure, title: str) -> None:
    """Write a title over a figure, in as many lines as it needs."""
    width = int(figure.get_figwidth() * 11)
    figure.suptitle("\n".join(textwrap.wrap(title, width)), fontsize=11)


def in_model_order(roles: Iterable[str]) -> list[str]:
    """Return names of roles as a model has them, from q to down; other names behind, as given."""
    order = {str(role): place for place, role in enumerate(Role)}
    return sorted(dict.fromkeys(roles), key=lambda role: order.get(role, len(order)))


def color_scale(values: Iterable[float], *, from_zero: bool = True) -> Normalize:
    """Return what turns values into colours: by their logarithm if they spread.

    Args:
        values: none of them negative.
        from_zero: whether the lightest colour is 0, and not the smallest value.
    """
    known = [value for value in values if value > 0 and math.isfinite(value)]
    if not known:
        return Normalize(0.0, 1.0)
    low, high = min(known), max(known)
    if high > _SPREAD * low:
        return LogNorm(low, high)
    return Normalize(0.0 if from_zero else low, high)


def unit(values: Iterable[float]) -> tuple[float, str]:
    """Return what to multiply values by so that they are short, and how that is called."""
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    for factor, name in ((1.0, ""), (1e3, "0.001 "), (1e6, "0.000001 ")):
        if most * factor >= 1:
            return factor, name
    return 1.0, ""


def width_of(blocks: int) -> float:
    """Return how wide a heat map of so many blocks is, in inches."""
    return min(max(_MARGIN + _CELL * blocks, 7.0), _WIDEST)


def heat_map(
    axis: Axes,
    cells: Cells,
    label: str,
    norm: Normalize,
    factor: float = 1.0,
    nothing: Iterable[tuple[str, int]] = (),
    rows: str = "role",
) -> None:
    """Draw values by role and block, that are never negative; what is not measured is hatched.

    Args:
        axis: where.
        cells: values by role and block.
        label: what they are.
        norm: see `color_scale`; several panels may share one.
        factor: what the numbers in cells, and on the colour bar, are multiplied by.
        nothing: cells that are within two errors of 0; they get a `~`.
        rows: what the rows are.
    """
    roles = in_model_order(role for role, _ in cells)
    blocks = list(range(max(block for _, block in cells) + 1))
    grid_RB = np.array([[cells.get((role, block), np.nan) for block in blocks] for role in roles])
    axis.set_facecolor("#eeeeee")
    axis.patch.set_hatch(UNMEASURED)
    axis.patch.set_edgecolor("#999999")
    lowest = norm.vmin or 0.0
    shown_RB = np.maximum(grid_RB, lowest)
    image = axis.imshow(shown_RB, aspect="auto", cmap=MAP, norm=norm, interpolation="nearest")
    axis.set_yticks(range(len(roles)), roles)
    step = max(1, math.ceil(len(blocks) / 32))
    axis.set_xticks(blocks[::step], [str(block) for block in blocks[::step]])
    axis.set_xlabel("block")
    axis.set_ylabel(rows)
    ticks = FuncFormatter(lambda value, _: f"{value * factor:.3g}")
    axis.figure.colorbar(image, ax=axis, label=label, shrink=0.9, format=ticks)
    marked = set(nothing)
    fits = width_of(len(blocks)) >= _MARGIN + _CELL * len(blocks)
    for row, role in enumerate(roles):
        for block in blocks:
            value = grid_RB[row, block]
            mark = "~" if (role, block) in marked else ""
            if np.isnan(value) or not (fits or mark):
                continue
            text = mark + (_short(value * factor) if fits else "")
            dark = norm(max(value, lowest)) > 0.5
            axis.text(
                block, row, text, ha="center", va="center", fontsize=6.5,
                color="white" if dark else "black",
            )  # fmt: skip


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def unmeasured(cells: Cells) -> str:
    """Return how many cells of a heat map were measured; empty where all were."""
    roles = {role for role, _ in cells}
    every = len(roles) * (max(block for _, block in cells) + 1)
    return "" if len(cells) == every else f" ({len(cells)} of {every} measured, others hatched)"


def legend_of(names: Sequence[str]) -> list[Any]:
    """Return what a legend shows for bars of several kinds: colour and hatch both tell them."""
    return [
        Patch(facecolor=COLORS[n % 8], hatch=HATCHES[n % 8], edgecolor="white", label=name)
        for n, name in enumerate(names)
    ]
