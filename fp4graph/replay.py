"""Trials that begin where they differ from the dense model: its values before each block are kept.

A trial that quantises linears of block 20 computes the same as the dense model up to there. On
average over blocks half of the work of a trial is saved, and all numbers stay what they were. What
follows block 20 is the dense model's graph again, which needs no rewriting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor

from fp4graph.passes.cuts import Cut, cuts, segment, tapped
from fp4graph.passes.pipeline import rows
from fp4graph.passes.site import site_of
from fp4graph.report import Report
from fp4graph.trace import TracedGraph

if TYPE_CHECKING:
    from collections.abc import Callable

    from fp4graph.policy import Policy
    from fp4graph.trace import TracedModel

_SHARE_OF_MEMORY = 0.5


class Replay:
    """A traced model that is run from any block on, for inputs that it has seen.

    Args:
        traced: the model, traced.
        pick: what to return of the model's output, a tensor.
        times: how many inputs there will be.

    Attributes:
        refusal: why the model cannot be cut, or None; then only `dense` may be called.
    """

    def __init__(self, traced: TracedModel, pick: Callable[[Any], Tensor], times: int) -> None:
        self._traced = traced
        self._pick = pick
        self._cuts: list[Cut] = []
        self._graphs: dict[tuple[Cut, Cut | None], TracedGraph] = {}
        self._kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._output = -1
        self._chosen: tuple[Cut, Cut | None] | None = None
        self._whole = traced.graphs[0] if traced.graphs else None
        self.refusal = self._find_cuts(times)

    def _find_cuts(self, times: int) -> str | None:
        if len(self._traced.graphs) != 1:
            return f"Dynamo made {len(self._traced.graphs)} graphs of it"
        found = cuts(self._traced.graphs[0].tagged)
        if isinstance(found, str):
            return found
        live = {node for cut in found for node in cut.live}
        needed = times * Cut(0, tuple(live)).bytes
        if needed > _SHARE_OF_MEMORY * psutil.virtual_memory().available:
            return f"the values before its blocks take {needed / 1e9:.1f} GB"
        self._cuts = found
        return None if found else "it has no blocks"

    @torch.no_grad()
    def dense(self, **inputs: Any) -> Tensor:
        """Run the dense model, and keep what its blocks begin with."""
        self._traced.select(None)
        if self.refusal is not None:
            return self._pick(self._traced(**inputs))
        graph = self._traced.graphs[0]
        live = list({node: None for cut in self._cuts for node in cut.live})
        taps = tapped(graph.tagged, live)
        outputs: list[Any] = []

        def run(*args: Any) -> Any:
            own, values = taps(*args)
            names = (node.name for node in live)
            self._kept.append((args, dict(zip(names, values, strict=True))))
            outputs.extend(own)
            return own

        graph.run = run
        try:
            picked = self._pick(self._traced(**inputs))
        finally:
            graph.run = graph.tagged.forward
        self._output = next((i for i, each in enumerate(outputs) if each is picked), -1)
        if self._output < 0:
            self.refusal = "its graph does not return the logits as they are"
        return picked

    def select(self, policy: Policy) -> Report:
        """Rewrite what comes after the deepest cut above everything that is selected.

        Raises:
            SelectorError: a term matches nothing.
            RefusalError: a selected linear cannot run in FP4.
        """
        assert self._whole is not None
        picked = [
            index
            for index, node in enumerate(self._whole.tagged.graph.nodes)
            if (site := site_of(node)) and policy.decide(site.tag).scheme
        ]
        first, last = min(picked, default=0), max(picked, default=0)
        places = [Cut(0, ()), *self._cuts]
        number = max(i for i, cut in enumerate(places) if cut.index <= first)
        end = next(iter(places[number + 1 :]), None)
        if end is not None and end.index <= last:
            end = None
        self._chosen = places[number], end
        report = Report()
        changed = self._graph(*self._chosen).rewrite(policy, "raise", self._traced.tags)
        report.add([*rows(self._whole.tagged), *changed])
        return report

    @torch.no_grad()
    def run(self, index: int) -> Tensor:
        """Return what the model as last selected gives for the input of the `index`-th `dense`."""
        assert self._chosen is not None
        start, end = self._chosen
        args, kept = self._kept[index]
        values = self._graph(start, end).run(*args, *(kept[node.name] for node in start.live))
        if end is not None:
            values = self._graph(end, None).tagged(*args, *values)
        picked: Tensor = values[self._output]
        return picked

    def _graph(self, start: Cut, end: Cut | None) -> TracedGraph:
        assert self._whole is not None
        if (start, end) not in self._graphs:
            args, kept = self._kept[0]
            example = (*args, *(kept[node.name] for node in start.live))
            part = segment(self._whole.tagged, start, end)
            self._graphs[start, end] = TracedGraph(part, example)
        return self._graphs[start, end]
