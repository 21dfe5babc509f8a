"""Trials that begin where they differ from a model that was run: values before blocks are kept.

A trial that quantises linears of block 20 computes the same as the dense model up to there, and one
that quantises all but those the same as the model that is in FP4 everywhere. On average over blocks
half of the work of a trial is saved, and all numbers stay what they were. What follows block 20 is
that model's graph again, which needs no rewriting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4graph.graph.site import site_of
from fp4graph.memory import fits
from fp4graph.passes.pipeline import rows
from fp4graph.report import Report
from fp4graph.traced.cuts import Cut, places, segment, tapped
from fp4graph.traced.model import TracedGraph
from fp4graph.traced.recorded import NO_LOGITS, place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy
    from fp4graph.report import LinearRow
    from fp4graph.traced.model import TracedModel

    Values = tuple[Any, ...]


class Replay:
    """A traced model that is run from any block on, for inputs that it has seen.

    Args:
        traced: the model, traced.
        pick: what to return of the model's output, a tensor.
        inputs: what it will be run on, keyword arguments each.

    Attributes:
        refusal: why the model cannot be cut, or None; then only `dense` may be called.
    """

    def __init__(
        self,
        traced: TracedModel,
        pick: Callable[[Any], Tensor],
        inputs: Sequence[Mapping[str, Any]],
    ) -> None:
        self._traced = traced
        self._pick = pick
        self._inputs = inputs
        self._places: list[Cut] = []
        self._graphs: dict[tuple[int, int], TracedGraph] = {}
        self._kept: list[tuple[Values, dict[str, Any]]] = []
        self._output = -1
        self._chosen: tuple[int, int] | None = None
        self._pieces: _Pieces | None = None  # kept while other trials come between
        self._base: _Pieces | None = None
        self._whole = traced.graphs[0] if traced.graphs else None
        self.refusal = self._find_cuts()

    def _find_cuts(self) -> str | None:
        found = places(self._traced.graphs)
        if isinstance(found, str):
            return found
        live = {node for cut in found for node in cut.live}
        everything = Cut(0, tuple(live))
        needed = len(self._inputs) * everything.bytes
        if not self._has_room(needed, everything.device):
            return f"the values before its blocks take {needed / 1e9:.1f} GB"
        self._places = found
        return None

    def _has_room(self, needed: int, device: torch.device) -> bool:
        return fits(needed, device)

    @torch.no_grad()
    def dense(self, index: int) -> Tensor:
        """Run the dense model on an input, in order, and keep what its blocks begin with."""
        inputs = self._inputs[index]
        self._traced.select(None)
        if self.refusal is not None:
            return self._pick(self._traced(**inputs))
        graph = self._traced.graphs[0]
        live = list({node: None for cut in self._places for node in cut.live})
        taps = tapped(graph.tagged, live)
        outputs: list[Any] = []

        def run(*args: Any) -> Any:
            own, values = taps(*args)
            names = (node.name for node in live)
            self._kept.append((args, dict(zip(names, values, strict=True))))
            outputs.extend(own)
            return own

        with graph.running(run):
            picked = self._pick(self._traced(**inputs))
        self._find_output(place_of(picked, outputs))
        return picked

    def _find_output(self, place: int) -> None:
        self._output = place
        if place < 0:
            self.refusal = NO_LOGITS

    def select(self, policy: Policy, base: Policy | None = None) -> Report:
        """Rewrite what comes between the cuts around everything in which two policies differ.

        Args:
            policy: what to rewrite.
            base: what most trials around this one have in common; None for the dense model.

        Raises:
            SelectorError: a term matches nothing.
            RefusalError: a selected linear cannot run in FP4.
        """
        assert self._whole is not None
        if base and (self._pieces is None or self._pieces.policy != base):
            self._pieces = self._rewrite_pieces(base)
        self._base = self._pieces if base else None
        self._chosen = start, end = self._changed(policy, base)
        report = Report()
        changed = self._graph(start, end).rewrite(policy, "raise", self._traced.tags)
        others = self._base.rows if self._base else ()
        report.add([*rows(self._whole.tagged), *others, *changed])
        return report

    def _changed(self, policy: Policy, base: Policy | None) -> tuple[int, int]:
        """Return the places around everything in which two policies differ."""
        assert self._whole is not None
        differing = [
            index
            for index, node in enumerate(self._whole.tagged.graph.nodes)
            if (site := site_of(node)) and _differ(policy, base, site.tag)
        ]
        first, last = min(differing, default=0), max(differing, default=0)
        starts = [cut.index for cut in self._places]
        start = max(i for i, index in enumerate(starts) if index <= first)
        end = start + 1
        if end < len(starts) and starts[end] <= last:
            end = len(starts)
        return start, end

    def _rewrite_pieces(self, policy: Policy) -> _Pieces:
        pieces = _Pieces(policy)
        for number in range(len(self._places)):
            piece = self._graph(number, number + 1)
            pieces.rows += piece.rewrite(policy, "raise", self._traced.tags)
            pieces.runs.append(piece.run)
        return pieces

    @torch.no_grad()
    def run(self, index: int) -> Tensor:
        """Return what the model as last selected gives for an input."""
        assert self._chosen is not None
        start, end = self._chosen
        args, kept = self._kept[index]
        if self._base:
            values = self._base.before(start, index, args)
        else:
            values = tuple(kept[node.name] for node in self._places[start].live)
        values = self._graph(start, end).run(*args, *values)
        if self._base:
            values = self._base.through(args, values, end)
        elif end < len(self._places):
            values = self._graph(end, len(self._places)).tagged(*args, *values)
        picked: Tensor = values[self._output]
        return picked

    def _graph(self, start: int, end: int) -> TracedGraph:
        """Return the graph from one place to another, the last being its end."""
        assert self._whole is not None
        if (start, end) not in self._graphs:
            args, kept = self._kept[0]
            before = self._places[start]
            after = self._places[end] if end < len(self._places) else None
            example = (*args, *(kept[node.name] for node in before.live))
            part = segment(self._whole.tagged, before, after)
            self._graphs[start, end] = TracedGraph(part, example)
        return self._graphs[start, end]


@dataclass
class _Pieces:
    """A rewritten model in pieces from place to place.

    Its values are kept at one place an input: trials in the order of blocks run it once for all.

    Attributes:
        policy: what was rewritten.
        runs: what computes each piece.
        rows: of all linears.
        reached: for each input a place, and the values there.
    """

    policy: Policy
    runs: list[Callable[..., Values]] = field(default_factory=list)
    rows: list[LinearRow] = field(default_factory=list)
    reached: dict[int, tuple[int, Values]] = field(default_factory=dict)

    def before(self, place: int, index: int, args: Values) -> Values:
        """Return the values at a place for an input."""
        reached, values = self.reached.get(index, (0, ()))
        if reached > place:
            reached, values = 0, ()
        values = self.through(args, values, reached, place)
        self.reached[index] = place, values
        return values

    def through(self, args: Values, values: Values, start: int, end: int | None = None) -> Values:
        """Run from one place to another, None for the end."""
        for run in self.runs[start:end]:
            values = run(*args, *values)
        return values


def _differ(policy: Policy, base: Policy | None, tag: LinearTag) -> bool:
    decision = policy.decide(tag)
    return decision.scheme is not None if base is None else decision != base.decide(tag)
