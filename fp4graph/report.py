"""What became of every linear: one row each, printable, JSON lines."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fp4graph.tables import Column, TextTable, to_columns, to_pandas

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

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
        merged: paths of the linears that are computed in the same call, for they share its input.
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
    merged: tuple[str, ...] = ()

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


@dataclass(repr=False)
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
        """One line: how many linears, how many bytes; or that nothing was compiled yet."""
        if not self.rows_by_path and not self.graphs:
            return (
                "nothing was compiled yet: call the compiled model first "
                '(methods such as generate() do not call it: README, "Use it")'
            )
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

    def to_dict(self) -> dict[str, list[Any]]:
        """Return the rows by column: `LinearRow`'s fields, each a list."""
        return to_columns(self.rows)

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame.

        Raises:
            OptionError: pandas is not installed.
        """
        return to_pandas(self.rows)

    def table(self, *, plans: bool = False) -> TextTable:
        """Return a table of all linears; with `plans`, layouts and tiles too."""
        blocks = ["" if row.block is None else str(row.block) for row in self]
        columns = [
            Column("path", [row.path for row in self], "text"),
            Column("role", self._roles(), "text"),
            Column("block", blocks, rank=2),
        ]
        return self._view(columns, [[row] for row in self], plans)

    def by_role(self, *, plans: bool = False) -> TextTable:
        """Return a table of linears that are alike but for their block, a row for each kind."""
        kinds: dict[tuple[object, ...], list[LinearRow]] = {}
        for row, role in zip(self, self._roles(), strict=True):
            how = (row.kernel, row.reason, *((row.layout, row.tile) if plans else ()))
            kinds.setdefault((role, _shape(row), *how), []).append(row)
        groups = list(kinds.values())
        columns = [
            Column("role", [str(role) for role, *_ in kinds], "text"),
            Column("blocks", [_blocks(group) for group in groups], "label"),
            Column("linears", [str(len(group)) for group in groups]),
        ]
        return self._view(columns, groups, plans)

    def _view(
        self, columns: list[Column], groups: Sequence[Sequence[LinearRow]], plans: bool
    ) -> TextTable:
        first = [group[0] for group in groups]
        sizes = [sum(row.bytes_dense for row in group) for group in groups]
        packed = [sum(row.bytes_packed or 0 for row in group) or None for group in groups]
        columns += [
            Column("shape", [_shape(row) for row in first], rank=3),
            Column("kernel", [row.kernel or "dense" for row in first], "text"),
        ]
        if plans:
            columns += [
                Column("layout", [row.layout or "" for row in first], "text", rank=1),
                Column("tile", [row.tile or "" for row in first], "text", rank=2),
            ]
            if any(row.merged for row in first):  # a plan alone does not know
                merged = [_merged(row) for row in first]
                columns.append(Column("merged with", merged, "text", rank=2))
        columns += [
            Column("dense MB", [_mb(size) for size in sizes], rank=4),
            Column("FP4 MB", [_mb(size) for size in packed], rank=4),
            Column("reason", [row.reason for row in first], "text", rank=1),
        ]
        faint = frozenset(number for number, row in enumerate(first) if not row.selected)
        return TextTable("", columns, [self.summary], faint)

    def _roles(self) -> list[str]:
        several = len({row.stack for row in self if row.block is not None}) > 1
        return [
            ":".join(filter(None, (row.stack if several else "", row.role, row.expert)))
            for row in self
        ]

    def __str__(self) -> str:
        return str(self.table())

    def __repr__(self) -> str:
        return f"<Report: {self.summary}>"

    def _repr_html_(self) -> str:
        return self.by_role().html()


def _shape(row: LinearRow) -> str:
    return "x".join(map(str, row.shape))


def _merged(row: LinearRow) -> str:
    return ", ".join(path.rpartition(".")[2] for path in row.merged)


def _mb(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.2f}"


def _blocks(rows: Sequence[LinearRow]) -> str:
    """Return the blocks of rows as a selector has them: `0..3,7`."""
    numbers = sorted({row.block for row in rows if row.block is not None})
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ",".join(
        f"{start}" if start == end else f"{start}..{end}"
        for start, end in zip(starts, ends, strict=True)
    )
