"""What a study returns: rows, a table of them for people, and what they mean in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from typing import TYPE_CHECKING, Any, overload

from rich.console import Console, Group
from rich.text import Text

from fp4graph import StudyError
from fp4graph.study.export import export
from fp4graph.tables import to_columns, to_pandas

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from rich.console import ConsoleOptions, RenderResult

    from fp4graph.tables import TextTable

_AS_TEXT = 120


class Table(Sequence[Any]):
    """The rows of a study, all of one dataclass, in the order in which they were measured.

    Args:
        rows: the rows; their fields are the columns, and the keys of the JSON lines.
        view: how people read them.
        verdict: what they mean, a sentence each.
        more: further tables that belong to it.
        draw: draws its picture into a file, if it has one.
    """

    def __init__(
        self,
        rows: Sequence[Any],
        view: TextTable,
        verdict: Sequence[str] = (),
        more: Sequence[Table] = (),
        draw: Callable[[Path], None] | None = None,
    ) -> None:
        self.rows = list(rows)
        self.view = view
        self.verdict = list(verdict)
        self.more = list(more)
        self._draw = draw

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self.rows[index]

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the rows by column; a field of a field is called `input.ratio`."""
        return to_columns(self.rows)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame, columns as in `to_dict`.

        Raises:
            OptionError: pandas is not installed.
        """
        return to_pandas(self.rows)

    def json_lines(self) -> str:
        """Return one JSON object a row, one row a line."""
        return "\n".join(json.dumps(asdict(row)) for row in self.rows)

    def save(self, path: Path) -> None:
        """Write the rows; the name says how: .jsonl, .csv or .parquet.

        Raises:
            OptionError: another name, or Parquet without pyarrow.
            StudyError: the file cannot be written.
        """
        export([asdict(row) for row in self.rows], path)

    def draw(self, path: Path) -> None:
        """Draw its picture; the name says how: .png, .svg or .pdf.

        Raises:
            OptionError: another name.
            StudyError: there is nothing to draw.
        """
        if self._draw is None:
            raise StudyError("there is no picture of this table")
        self._draw(path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table, what it means, and the tables that belong to it."""
        yield self.view
        yield Group(*(Text(f"=> {each}") for each in self.verdict))
        for each in self.more:
            yield Text()
            yield each

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=_AS_TEXT, highlight=False, force_jupyter=False).print(self)
        return out.getvalue()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        import html

        words = "".join(f"<p><b>{html.escape(each)}</b></p>" for each in self.verdict)
        return self.view.html() + words + "".join(each._repr_html_() for each in self.more)
