"""What linears of a model larger than memory work on: block by block, backward passes too."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4graph.errors import StudyError
from fp4graph.mapped import MappedFile
from fp4graph.traced.cuts import places, segment
from fp4graph.traced.recorded import NO_LOGITS, graph_inputs, output_place
from fp4graph.traced.tap import TRACED_ANEW, Step, Watched, gradients_by, seen_by_tag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fp4graph.traced.cuts import Cut
    from fp4graph.traced.model import TracedModel
    from fp4graph.traced.tap import Call, Gradients, Inputs, Losses


@dataclass
class _Run:
    """An input on its way through the blocks.

    Attributes:
        args: what the whole graph is given.
        live: values between blocks, by node.
        gradients: for each loss, those by the values before the block that was left last.
    """

    args: tuple[Any, ...]
    live: dict[str, Any] = field(default_factory=dict)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)


class StreamedTap:
    """A `LinearTap` of a traced model, which runs each block on all inputs before the next.

    Values and gradients between blocks lie in files. A block is run again for its gradients.

    Args:
        traced: the model, traced.
        inputs: of the model, keyword arguments each.
        folder: for the files, on a disk.
        losses: see `LinearTap.steps`.

    Attributes:
        refusal: why the model cannot be cut, or None; then nothing else may be called.

    Raises:
        StudyError: linears are inside higher-order ops; Dynamo traced the model anew.
    """

    def __init__(
        self,
        traced: TracedModel,
        inputs: Sequence[Inputs],
        folder: Path,
        losses: Losses | None = None,
    ) -> None:
        self._folder, self._losses = folder, losses
        self._needs_grad: set[str] = set()
        self._places: list[Cut] = []
        self._pieces: list[Watched] = []
        self._runs: list[_Run] = []
        with torch.set_grad_enabled(losses is not None):
            self.refusal = self._cut(traced, inputs)

    def _cut(self, traced: TracedModel, inputs: Sequence[Inputs]) -> str | None:
        found = places(traced.graphs)
        if isinstance(found, str):
            return found
        for each in inputs:
            args = graph_inputs(traced, each)
            if args is None:
                raise StudyError(TRACED_ANEW)
            self._runs.append(_Run(args))
        self._output = output_place(traced, inputs[0], lambda out: out.logits)
        if self._output < 0:
            return NO_LOGITS
        self._places = found
        for start, end in zip(found, [*found[1:], None], strict=True):
            self._pieces.append(Watched(segment(traced.graphs[0].tagged, start, end)))
        pieces = Counter(tag for piece in self._pieces for tag in dict.fromkeys(piece.tags))
        again = next((tag.fqn for tag, count in pieces.items() if count > 1), None)
        return f"{again} is used in several blocks" if again else None

    @property
    def parts(self) -> int:
        """How many steps an input has."""
        return len(self._pieces)

    def steps(self) -> Iterator[Step]:
        """Yield what linears saw and the gradients of losses, block by block, input by input.

        With losses from the last block to the first.

        Raises:
            StudyError: values cannot be kept.
        """
        file = MappedFile(self._folder)
        last = len(self._pieces) - 1
        for number in range(last if self._losses else last + 1):
            for index, run in enumerate(self._runs):
                seen = self._forward(number, run, file)
                if not self._losses:
                    yield Step(index, seen_by_tag(seen), [])
        if self._losses:
            for number in range(last, -1, -1):
                file = MappedFile(self._folder)
                for index, run in enumerate(self._runs):
                    yield self._backward(number, index, run, self._losses, file)

    def _run(self, number: int, run: _Run) -> tuple[Any, list[Call], list[Tensor]]:
        """Run a piece; return what it gives, what linears saw, and what gradients go on to."""
        names = [node.name for node in self._places[number].live]
        live = [run.live[name] for name in names]
        wanted = []
        for place, name in enumerate(names):
            if name in self._needs_grad:
                live[place] = live[place].detach().requires_grad_()
                wanted.append(live[place])
        with torch.set_grad_enabled(self._losses is not None):
            own, calls = self._pieces[number](*run.args, *live)
        return own, calls, wanted

    def _forward(self, number: int, run: _Run, file: MappedFile) -> list[Call]:
        own, calls, _ = self._run(number, run)
        if number + 1 < len(self._places):
            for node, each in zip(self._places[number + 1].live, own, strict=True):
                if isinstance(each, Tensor) and each.requires_grad:
                    self._needs_grad.add(node.name)
                if node.name not in run.live:
                    run.live[node.name] = file.keep(each) if isinstance(each, Tensor) else each
        return calls

    def _backward(
        self, number: int, index: int, run: _Run, losses: Losses, file: MappedFile
    ) -> Step:
        own, calls, wanted = self._run(number, run)
        names = [node.name for node in self._places[number].live if node.name in self._needs_grad]
        found: list[Gradients] = []
        before: list[dict[str, Tensor]] = []
        for outputs, given in self._ends(number, index, run, own, losses):
            by_linear, by_live = gradients_by(calls, outputs, given, wanted)
            found.append(by_linear)
            pairs = zip(names, by_live, strict=True)
            before.append({name: file.keep(each) for name, each in pairs if each is not None})
        run.gradients = before
        return Step(index, seen_by_tag(calls), found)

    def _ends(
        self, number: int, index: int, run: _Run, own: Any, losses: Losses
    ) -> Iterator[tuple[list[Tensor], list[Tensor] | None]]:
        """Yield for each loss what a piece gives, and the gradients by it."""
        if number + 1 == len(self._pieces):
            for loss in losses(index, own[self._output]):
                yield [loss], None
            return
        names = [node.name for node in self._places[number + 1].live]
        for gradients in run.gradients:
            pairs = [
                (y, gradients[name])
                for name, y in zip(names, own, strict=True)
                if name in gradients
            ]
            yield [y for y, _ in pairs], [gradient for _, gradient in pairs]
