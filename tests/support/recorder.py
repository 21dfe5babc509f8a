"""A torch.compile backend that keeps the graph before and after given passes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from fp4graph.passes.base import PassRecord, op_counts, run_passes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.fx import GraphModule

    from fp4graph.passes.base import GraphPass


class Recorder:
    """Runs passes on the first graph it is given and keeps what they changed."""

    def __init__(self, *passes: GraphPass) -> None:
        self._passes = passes
        self.before: Counter[str] = Counter()
        self.after: Counter[str] = Counter()
        self.records: list[PassRecord] = []
        self.gm: GraphModule | None = None
        self.inputs: Sequence[Any] = ()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.gm, self.inputs = gm, example_inputs
        self.before = op_counts(gm)
        self.records = run_passes(gm, example_inputs, self._passes)
        self.after = op_counts(gm)
        return gm.forward
