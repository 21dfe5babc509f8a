"""Trials of a model that is larger than memory: each block is read once for all inputs.

Values between blocks lie in files. A block's linears are packed, run on all inputs and dropped
before the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fp4graph.errors import StudyError
from fp4graph.mapped import MappedFile
from fp4graph.packed.cache import CACHE
from fp4graph.passes.pipeline import rows
from fp4graph.report import Report
from fp4graph.traced.recorded import graph_inputs, output_place
from fp4graph.traced.replay import Replay
from fp4graph.traced.tap import TRACED_ANEW

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from fp4graph.policy import Policy
    from fp4graph.report import LinearRow
    from fp4graph.traced.model import TracedGraph, TracedModel
    from fp4graph.traced.replay import Values


class StreamedReplay(Replay):
    """A traced model that is run block by block, each on all inputs.

    Args:
        traced: the model, traced.
        pick: what to return of the model's output, a tensor.
        inputs: what it will be run on, keyword arguments each.
        folder: for values between blocks, on a disk.
        told: is called after each part that all inputs ran through: its number from 1, and how many
            there are.

    Raises:
        StudyError: the disk has no room for them.
    """

    def __init__(
        self,
        traced: TracedModel,
        pick: Callable[[Any], Tensor],
        inputs: Sequence[Mapping[str, Any]],
        folder: Path,
        told: Callable[[int, int], None],
    ) -> None:
        self._folder, self._told = folder, told
        self._file = MappedFile(folder)
        super().__init__(traced, pick, inputs)
        self._last: TracedGraph | None = None
        self._values: list[Values] = []  # of the last selection, before the last place
        self._before: _Before | None = None

    def _has_room(self, needed: int, device: torch.device) -> bool:
        self._file.room(needed)
        return True

    @torch.no_grad()
    def dense(self, index: int) -> Tensor:
        """See `Replay.dense`; the first one runs all inputs."""
        if self.refusal is None and not index:
            self._traced.select(None)
            self._kept = [(self._given(inputs), {}) for inputs in self._inputs]
            self._find_output(output_place(self._traced, self._inputs[0], self._pick))
        if self.refusal is not None:
            return super().dense(index)
        if not index:
            for number, after in enumerate(self._places[1:]):
                values = self._through(number, None, self._dense_values(number), self._file)[0]
                for (_, kept), each in zip(self._kept, values, strict=True):
                    kept.update(zip((node.name for node in after.live), each, strict=True))
            number = len(self._places) - 1
            self._finish(number, None, self._dense_values(number))
        return self.run(index)

    def _given(self, inputs: Mapping[str, Any]) -> Values:
        found = graph_inputs(self._traced, inputs)
        if found is None:
            raise StudyError(TRACED_ANEW)
        return found

    @torch.no_grad()
    def select(self, policy: Policy, base: Policy | None = None) -> Report:
        """Run all blocks but the last with what a policy selects; see `Replay.select`."""
        assert self._whole is not None
        start, end = self._changed(policy, base)
        found: list[LinearRow] = []
        if base is None:
            values = self._dense_values(start)
        else:
            values, found = self._base_values(start, base)
        last = len(self._places) - 1
        for number in range(start, last):
            values, more = self._through(number, policy if number < end else base, values)
            found += more
        found += self._finish(last, policy if last < end else base, values)
        report = Report()
        report.add([*rows(self._whole.tagged), *found])
        return report

    @torch.no_grad()
    def run(self, index: int) -> Tensor:
        """See `Replay.run`."""
        assert self._last is not None
        args, _ = self._kept[index]
        picked: Tensor = self._last.run(*args, *self._values[index])[self._output]
        return picked

    def _dense_values(self, place: int) -> list[Values]:
        names = [node.name for node in self._places[place].live]
        return [tuple(kept[name] for name in names) for _, kept in self._kept]

    def _base_values(self, place: int, base: Policy) -> tuple[list[Values], list[LinearRow]]:
        """Return the values at a place of what most trials have in common, and rows up to it."""
        before = self._before
        if before is None or before.policy != base or len(before.rows) > place:
            before = self._before = _Before(base, [()] * len(self._kept))
        while len(before.rows) < place:
            before.values, more = self._through(len(before.rows), base, before.values)
            before.rows.append(more)
        return before.values, [row for piece in before.rows for row in piece]

    def _through(
        self,
        number: int,
        policy: Policy | None,
        values: Sequence[Values],
        file: MappedFile | None = None,
    ) -> tuple[list[Values], list[LinearRow]]:
        """Run all inputs from one place to the next."""
        file = file or MappedFile(self._folder)
        graph = self._graph(number, number + 1)
        found = graph.rewrite(policy, "raise", self._traced.tags)
        after = []
        for (args, _), before in zip(self._kept, values, strict=True):
            given = (*args, *before)
            after.append(file.keep_new(graph.run(*given), given))
        self._drop(graph)
        self._told(number + 1, len(self._places))
        return after, found

    def _finish(self, number: int, policy: Policy | None, values: list[Values]) -> list[LinearRow]:
        if self._last is not None:
            self._drop(self._last)
        self._values = values
        self._last = self._graph(number, number + 1)
        return self._last.rewrite(policy, "raise", self._traced.tags)

    def _drop(self, graph: TracedGraph) -> None:
        """Let go of what a graph's weights were packed into."""
        graph.rewrite(None, "raise", self._traced.tags)
        for weight in graph.weights:
            CACHE.forget(weight)


class _Before:
    """What most trials have in common, run up to some place.

    Args:
        policy: what is rewritten.
        values: of each input, there.
    """

    def __init__(self, policy: Policy, values: list[Values]) -> None:
        self.policy, self.values = policy, values
        self.rows: list[list[LinearRow]] = []  # of each piece
