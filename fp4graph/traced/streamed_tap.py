"""What linears of a model larger than memory work on: block by block, backward passes too."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fp4graph.errors import StudyError
from fp4graph.mapped import MappedFile
from fp4graph.traced.cuts import Cut, cuts, segment
from fp4graph.traced.streamed import recorded
from fp4graph.traced.tap import LinearTap, Step, Watched, gradients_by, seen_by_tag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fp4graph.traced.model import TracedModel
    from fp4graph.traced.tap import Call, Gradients, Inputs, Losses

_LOG = logging.getLogger("fp4graph.stream")


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
        folder: for the files, on a disk.

    Attributes:
        parts: how many steps an input has.

    Raises:
        StudyError: linears are inside higher-order ops; values cannot be kept.
    """

    def __init__(self, traced: TracedModel, folder: Path) -> None:
        self._traced, self._folder = traced, folder
        self._output = 0
        self._needs_grad: set[str] = set()
        self._places: list[Cut] = []
        self._pieces: list[Watched] = []
        refusal = self._cut()
        self._whole = None if refusal is None else LinearTap(traced)
        if refusal is not None:
            _LOG.warning("each window runs the whole model: %s", refusal)

    def _cut(self) -> str | None:
        if len(self._traced.graphs) != 1:
            return f"Dynamo made {len(self._traced.graphs)} graphs of it"
        gm = self._traced.graphs[0].tagged
        found = cuts(gm)
        if isinstance(found, str):
            return found
        self._places = [Cut(0, ()), *found]
        ends = [*found, None]
        for start, end in zip(self._places, ends, strict=True):
            self._pieces.append(Watched(segment(gm, start, end)))
        pieces = Counter(tag for piece in self._pieces for tag in dict.fromkeys(piece.tags))
        again = next((tag.fqn for tag, count in pieces.items() if count > 1), None)
        return f"{again} is used in several blocks" if again else None

    @property
    def parts(self) -> int:
        """How many steps an input has."""
        return 1 if self._whole else len(self._pieces)

    def steps(self, inputs: Sequence[Inputs], losses: Losses | None = None) -> Iterator[Step]:
        """Yield what linears saw and the gradients of losses, block by block, input by input.

        With losses from the last block to the first. See `LinearTap.steps`.
        """
        if self._whole is not None:
            yield from self._whole.steps(inputs, losses)
            return
        with torch.set_grad_enabled(losses is not None):
            runs = list(map(self._begin, inputs))
        file = MappedFile(self._folder)
        last = len(self._pieces) - 1
        for number in range(last if losses else last + 1):
            for index, run in enumerate(runs):
                seen = self._forward(number, run, file, grads=losses is not None)
                if not losses:
                    yield Step(index, seen_by_tag(seen), [])
        if losses:
            for number in range(last, -1, -1):
                file = MappedFile(self._folder)
                for index, run in enumerate(runs):
                    yield self._backward(number, index, run, losses, file)

    def _begin(self, inputs: Inputs) -> _Run:
        args, outputs, out = recorded(self._traced, inputs)
        self._output = next((i for i, each in enumerate(outputs) if each is out.logits), -1)
        if self._output < 0:
            raise StudyError("a streamed model's graph has to return the logits as they are")
        return _Run(args)

    def _run(self, number: int, run: _Run, *, grads: bool) -> tuple[Any, list[Call], list[Tensor]]:
        """Run a piece; return what it gives, what linears saw, and what gradients go on to."""
        names = [node.name for node in self._places[number].live]
        live = [run.live[name] for name in names]
        wanted = []
        if grads:
            for place, name in enumerate(names):
                if name in self._needs_grad:
                    live[place] = live[place].detach().requires_grad_()
                    wanted.append(live[place])
        with torch.set_grad_enabled(grads):
            own, calls = self._pieces[number](*run.args, *live)
        return own, calls, wanted

    def _forward(self, number: int, run: _Run, file: MappedFile, *, grads: bool) -> list[Call]:
        own, calls, _ = self._run(number, run, grads=grads)
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
        own, calls, wanted = self._run(number, run, grads=True)
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
