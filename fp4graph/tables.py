"""Tables for a terminal, a pipe or a notebook: a number is shown whole or not at all."""

from __future__ import annotations

import html
import textwrap
from dataclasses import asdict, dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

from fp4graph.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import ConsoleOptions, RenderResult

_GAP = 2
_LABEL = 60  # no label is wider, be there ever so much room
_NARROW_LABEL = 28  # columns are left out before labels get narrower
_NARROW_TEXT = 16
_NOTE = 100
_AS_TEXT = 160


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        name: its head.
        cells: one text a row.
        kind: a `label` that is too long becomes a number with a legend, a `text` is cut in its
            middle and stands above the table if it is the same in all rows, a `number` is neither.
        rank: where there is no room, the column with the highest is left out first; 0 always stays.
    """

    name: str
    cells: Sequence[str]
    kind: Literal["label", "text", "number"] = "number"
    rank: int = 0

    @property
    def width(self) -> int:
        """Characters that it takes to show it whole."""
        return max(map(len, (self.name, *self.cells)))

    @property
    def least(self) -> int:
        """Characters that it needs before others are left out for it."""
        narrow = {"label": _NARROW_LABEL, "text": _NARROW_TEXT, "number": self.width}
        return min(self.width, narrow[self.kind])


@dataclass(frozen=True)
class TextTable:
    """A table that fits the width that there is.

    Attributes:
        title: stands above it.
        columns: from left to right, all of one length.
        notes: sentences below it.
        faint: numbers of rows that matter less.
        wrong: numbers of rows that are errors, in red.
    """

    title: str
    columns: Sequence[Column]
    notes: Sequence[str] = ()
    faint: frozenset[int] = frozenset()
    wrong: frozenset[int] = frozenset()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield its lines for the width of a console."""
        yield from self._lines(options.max_width)

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=_AS_TEXT, highlight=False, force_jupyter=False).print(self)
        return out.getvalue()

    def html(self) -> str:
        """Return it as HTML, every cell whole."""
        heads = "".join(f"<th>{html.escape(column.name)}</th>" for column in self.columns)
        rows = [
            "<tr>" + "".join(f"<td>{html.escape(each)}</td>" for each in cells)
            for cells in zip(*(column.cells for column in self.columns), strict=True)
        ]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}<tr>{heads}</tr>{''.join(rows)}</table>{notes}"

    def _lines(self, width: int) -> Iterator[Text]:
        alike = [column for column in self.columns if _is_alike(column)]
        shown = [column for column in self.columns if column not in alike]
        left_out: list[Column] = []
        while _total([column.least for column in shown]) > width:
            column = max(shown, key=lambda each: each.rank)
            if not column.rank:
                break
            shown.remove(column)
            left_out.append(column)
        widths = _widths(shown, width)
        if self.title:
            yield from (Text(line, style="bold") for line in _wrap(self.title, width))
        if alike:
            same = (f"{each.name} {next(filter(None, each.cells))}" for each in alike)
            yield Text(f"in all rows: {', '.join(same)}")
        legend: list[str] = []
        columns = [
            _fitted(column, room, legend) for column, room in zip(shown, widths, strict=True)
        ]
        yield Text(_line([column.name for column in shown], shown, widths), style="bold")
        for number, cells in enumerate(zip(*columns, strict=True)):
            style = "red" if number in self.wrong else "dim" if number in self.faint else ""
            yield Text(_line(cells, shown, widths), style=style)
        for line in legend:
            yield from map(Text, _wrap(line, width))
        notes = list(self.notes)
        if left_out:
            names = ", ".join(column.name for column in self.columns if column in left_out)
            notes.append(f"no room at {width} columns for: {names}; --json has all")
        for note in notes:
            yield from map(Text, _wrap(note, min(width, _NOTE)))


def _is_alike(column: Column) -> bool:
    """Whether a column of text says the same in all rows that say anything."""
    return column.kind == "text" and len(column.cells) > 1 and len(set(column.cells) - {""}) == 1


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _widths(columns: Sequence[Column], width: int) -> list[int]:
    """Return how wide columns are: what is spare goes to labels and texts that want it."""
    widths = [column.least for column in columns]
    for number, column in enumerate(columns):
        if column.kind != "number":
            most = min(column.width, _LABEL if column.kind == "label" else column.width)
            spare = max(width - _total(widths), 0)
            widths[number] = min(most, widths[number] + spare)
    while _total(widths) > width:  # narrower than anybody's terminal: labels give way
        widest = max(range(len(widths)), key=lambda n: (columns[n].kind != "number", widths[n]))
        if columns[widest].kind == "number" or widths[widest] <= 1:
            break
        widths[widest] -= 1
    return widths


def _fitted(column: Column, width: int, legend: list[str]) -> list[str]:
    """Return the cells at a width; labels that are too long go to the legend."""
    if column.kind == "number":
        return list(column.cells)
    cells = []
    numbers: dict[str, int] = {}
    for cell in column.cells:
        if len(cell) <= width:
            cells.append(cell)
        elif column.kind == "text":
            cells.append(cut_middle(cell, width))
        else:
            if cell not in numbers:
                legend.append(f"#{len(legend) + 1} {cell}")
                numbers[cell] = len(legend)
            cells.append(f"#{numbers[cell]} {cell}"[: max(width - 1, 3)] + "…")
    return cells


def cut_middle(text: str, width: int) -> str:
    """Return a text with its middle left out, so that it is no longer than `width`."""
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


def _line(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    parts = [
        cell.rjust(width) if column.kind == "number" else cell.ljust(width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    return (" " * _GAP).join(parts).rstrip()


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False) or [""]


def digits_for(values: Sequence[float | None]) -> int:
    """Return how many digits show the smallest of some numbers, four to seven."""
    least = min((abs(value) for value in values if value), default=1.0)
    return 4 if least >= 0.001 else 6 if least >= 0.00001 else 7


def nats(values: Sequence[float | None], digits: int = 4, *, signed: bool = False) -> list[str]:
    """Return numbers with so many digits behind the point; what is None is empty."""
    form = f"{'+' if signed else ''}.{digits}f"
    return ["" if value is None else format(value, form) for value in values]


def to_columns(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Return dataclasses by column; a field of a field is called `input.ratio`."""
    flat = [dict(_flat(asdict(row))) for row in rows]
    names = dict.fromkeys(name for row in flat for name in row)
    return {name: [row.get(name) for row in flat] for name in names}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}.")
        else:
            yield before + name, value


def to_pandas(rows: Sequence[Any]) -> Any:
    """Return dataclasses as a pandas DataFrame, columns as in `to_columns`.

    Raises:
        OptionError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError:
        raise OptionError("to_pandas needs a package: pip install 'fp4graph[pandas]'") from None
    return pd.DataFrame(to_columns(rows))
