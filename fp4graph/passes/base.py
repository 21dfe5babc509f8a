"""What a pass is, and the one runner for all of them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fp4graph.files import write_text
from fp4graph.graph.regions import regions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import GraphModule

_LOG = logging.getLogger("fp4graph.passes")
_GRAPH_NUMBER = itertools.count()


class GraphPass(Protocol):
    """A frozen dataclass whose fields are its options; valid graph in, valid graph out.

    It changes `gm` in place; linting and recompiling are the runner's.
    """

    name: ClassVar[str]

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Change the graph.

        Args:
            gm: a graph as Dynamo made it, parameters lifted to placeholders.
            example_inputs: one real value a placeholder, in order.
        """


@dataclass(frozen=True)
class PassRecord:
    """What one pass did.

    Attributes:
        name: the pass.
        seconds: how long it took.
        changes: (before, after) for each op whose count changed.
    """

    name: str
    seconds: float
    changes: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        ops = ", ".join(
            f"{op}: {before} -> {after} ({after - before:+d})"
            for op, (before, after) in self.changes.items()
        )
        return f"{self.name}: {self.seconds * 1e3:.1f} ms; {ops or 'no op added or removed'}"


def op_counts(gm: GraphModule) -> Counter[str]:
    """Count the graph's calls by the name of what they call."""
    return Counter(
        getattr(node.target, "__name__", str(node.target))
        for region in regions(gm)
        for node in region.gm.graph.nodes
        if node.op in ("call_function", "call_method", "call_module")
    )


def run_passes(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    passes: Sequence[GraphPass],
    *,
    recompile: bool = True,
) -> list[PassRecord]:
    """Run passes in order: each is timed, the graph linted and op counts compared; then recompile.

    Recompiling takes longer than most passes, and may be left out where the graph is not run as
    it is.

    Records are logged to `fp4graph.passes` at level INFO. With the environment variable
    `FP4GRAPH_DUMP` set to a folder, the graph is written there before and after each pass. Passes
    that `FP4GRAPH_SKIP` names are left out, with a warning.
    """
    dump = os.environ.get("FP4GRAPH_DUMP")
    number = next(_GRAPH_NUMBER)
    records = []
    after = op_counts(gm)
    for index, run in enumerate(passes):
        if run.name in skipped():
            _LOG.warning("graph %d: FP4GRAPH_SKIP leaves out the pass %s", number, run.name)
            continue
        stem = f"graph{number}.{index}.{run.name}"
        _dump(gm, dump, f"{stem}.before")
        before = after
        start = time.perf_counter()
        run(gm, example_inputs)
        seconds = time.perf_counter() - start
        for region in regions(gm):
            region.gm.graph.lint()
        after = op_counts(gm)
        changes = {
            op: (before[op], after[op]) for op in sorted(before | after) if before[op] != after[op]
        }
        records.append(PassRecord(run.name, seconds, changes))
        _LOG.info("graph %d, %s", number, records[-1])
        _dump(gm, dump, f"{stem}.after")
    for region in list(regions(gm)) if recompile else ():
        region.gm.recompile()
    return records


def skipped() -> tuple[str, ...]:
    """Return the names of passes that `FP4GRAPH_SKIP` leaves out, to find which one is to blame."""
    names = os.environ.get("FP4GRAPH_SKIP", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


def _dump(gm: GraphModule, folder: str | None, stem: str) -> None:
    if folder:
        text = gm.print_readable(print_output=False)
        write_text(Path(folder) / f"{stem}.txt", text)
