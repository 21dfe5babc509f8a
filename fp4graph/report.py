"""What became of every linear: one row each, printable, JSON lines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fp4graph.linears.tags import LinearTag


REFUSED = "refused: "


@dataclass(frozen=True)
class LinearRow:
    """One linear of a compiled model.

    Attributes:
        path: module path.
        role: role by its selector name.
        block: block index in its stack, None outside the blocks.
        shape: (N, K), experts in front where they are stacked.
        selected: whether it runs in FP4.
        kernel: who computes it; None where it stays dense.
        reason: which selector chose it and how it runs, or why it stays dense.
        bytes_dense: size of the model's own weight.
        bytes_packed: size of the packed weight; None where it stays dense.
        layout: how the packed weight lies in memory; None where it stays dense.
        tile: how the kernel cuts the work, by the number of rows M of the input; None where dense.
        why: what told the role: the linear's name, or where its result flows; empty for `other`.
        stack: the stack of blocks that it belongs to: text, vision, audio, encoder, decoder.
        expert: of an expert, which of its linears it is; None elsewhere.
        rows: of a fused weight of which a part alone runs in FP4, that part's rows; else None.
    """

    path: str
    role: str
    block: int | None
    shape: tuple[int, ...]
    selected: bool
    kernel: str | None
    reason: str
    bytes_dense: int
    bytes_packed: int | None
    layout: str | None = None
    tile: str | None = None
    why: str = ""
    stack: str = "text"
    expert: str | None = None
    rows: int | None = None

    @property
    def parameters(self) -> int:
        """Number of values that run in FP4, if it is selected."""
        *experts, N, K = self.shape
        return math.prod(experts) * (N if self.rows is None else self.rows) * K

    @classmethod
    def of(cls, tag: LinearTag, bytes_dense: int, reason: str) -> LinearRow:
        """Build the row of a tagged linear that stays dense."""
        return cls(
            path=tag.fqn,
            role=str(tag.role),
            block=tag.block,
            shape=tag.shape,
            selected=False,
            kernel=None,
            reason=reason,
            bytes_dense=bytes_dense,
            bytes_packed=None,
            why=tag.why,
            stack=tag.stack,
            expert=tag.expert and str(tag.expert),
        )

    @classmethod
    def of_unreached(
        cls, tag: LinearTag, bytes_dense: int, reason: str, selected: bool
    ) -> LinearRow:
        """Build the row of a linear that is in no graph, and so runs dense if it runs at all."""
        what = REFUSED if selected else "not in any graph: "
        return cls.of(tag, bytes_dense, f"{what}{reason}")


@dataclass
class Report:
    """The rows of all graphs that a backend compiled; a later graph's row replaces an earlier's.

    Pass an empty one to `backend(report=...)`, or read the backend's `report`.

    Attributes:
        rows_by_path: the rows.
        graphs: how many graphs were compiled.
    """

    rows_by_path: dict[str, LinearRow] = field(default_factory=dict)
    graphs: int = 0

    def add(self, rows: Iterable[LinearRow]) -> None:
        """Take in the rows of one graph."""
        self.graphs += 1
        self.include(rows)

    def include(self, rows: Iterable[LinearRow]) -> None:
        """Take in rows of what is in no graph."""
        for row in rows:
            self.rows_by_path[row.path] = row

    def drop(self, paths: Iterable[str]) -> None:
        """Take out the rows of linears that are no longer there."""
        for path in paths:
            self.rows_by_path.pop(path, None)

    def __iter__(self) -> Iterator[LinearRow]:
        return iter(self.rows_by_path.values())

    def __len__(self) -> int:
        return len(self.rows_by_path)

    @property
    def rows(self) -> list[LinearRow]:
        """All rows, in the order of the model."""
        return list(self)

    @property
    def selected(self) -> list[LinearRow]:
        """The rows of linears that run in FP4."""
        return [row for row in self if row.selected]

    @property
    def refused(self) -> list[LinearRow]:
        """The rows of linears that are selected and stay dense."""
        return [row for row in self if row.reason.startswith(REFUSED)]

    @property
    def bytes_dense(self) -> int:
        """Bytes of all linears' own weights."""
        return sum(row.bytes_dense for row in self)

    @property
    def bytes_selected(self) -> int:
        """Bytes of all linears if the selected ones are packed and their dense weights dropped."""
        return sum(
            row.bytes_dense if row.bytes_packed is None else row.bytes_packed for row in self
        )

    @property
    def summary(self) -> str:
        """One line: how many linears, how many bytes."""
        unknown = sum(row.role == "other" and row.block is not None for row in self)
        note = f"; {unknown} in blocks have no known role: `other` or path:" if unknown else ""
        return (
            f"{len(self.selected)} of {len(self)} linears in FP4; linear weights "
            f"{self.bytes_dense / 1e6:.1f} MB dense, {self.bytes_selected / 1e6:.1f} MB as selected"
            f"{note}"
        )

    def json_lines(self) -> str:
        """Return one JSON object a row, one row a line."""
        return "\n".join(json.dumps(asdict(row)) for row in self)

    def table(self, *, plans: bool = False) -> Table:
        """Return the rows as a table for a terminal; with `plans`, layouts and tiles too."""
        table = Table(caption=self.summary, box=box.SIMPLE_HEAD)
        names = ["path", "role", "block", "shape", "kernel", "dense MB", "FP4 MB", "reason"]
        if plans:
            names[5:5] = ["layout", "tile"]
        for name in names:
            numeric = name in ("block", "dense MB", "FP4 MB")
            table.add_column(name, justify="right" if numeric else "left", overflow="fold")
        several = len({row.stack for row in self if row.block is not None}) > 1
        for row in self:
            table.add_row(
                row.path,
                ":".join(filter(None, (row.stack if several else "", row.role, row.expert))),
                "" if row.block is None else str(row.block),
                "x".join(map(str, row.shape)),
                row.kernel or "dense",
                *((row.layout or "", row.tile or "") if plans else ()),
                f"{row.bytes_dense / 1e6:.2f}",
                "" if row.bytes_packed is None else f"{row.bytes_packed / 1e6:.2f}",
                row.reason,
                style=None if row.selected else "dim",
            )
        return table

    def __str__(self) -> str:
        out = StringIO()
        Console(file=out, width=160).print(self.table())
        return out.getvalue()
