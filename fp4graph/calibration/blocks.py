"""A model that is run block by block: what comes into each is seen, what goes out goes on.

At any moment there are the values between two blocks, so that a model needs little more memory than
it takes anyway; where they are too large for it, they lie in a file. What is run at once is a
block, and more where a weight is used in several, as in looped models: what comes into all its uses
decides its codes.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.cache import cache_folder
from fp4graph.calibration.block_inputs import Seen, look
from fp4graph.calibration.layout import record, selected, starts
from fp4graph.calibration.round_inputs import round_inputs
from fp4graph.errors import CalibrationError
from fp4graph.fingerprint import fingerprint
from fp4graph.graph.match import match_linear
from fp4graph.graph.regions import copy_graph, regions
from fp4graph.graph.site import LinearSite, site_of
from fp4graph.mapped import MappedFile
from fp4graph.memory import fits, give_back_memory
from fp4graph.passes.base import run_passes
from fp4graph.passes.select import SelectLinears
from fp4graph.private import SET_GRAD_ENABLED
from fp4graph.quantizers import matrix_name
from fp4graph.traced.cuts import Cut, Part, cuts
from fp4graph.traced.model import TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch.fx import Node

    from fp4graph.policy import Policy
    from fp4graph.quantizers import Transform

    Args = tuple[Any, ...]
    Error = Callable[[Mapping[str, Tensor], Mapping[str, Transform], int], Tensor]


class Blocks:
    """A model in blocks, and for each batch the values that come into the next one.

    Args:
        model: the model.
        batches: its inputs, see `fp4graph.calibrate`.
        policy: which linears are selected.
        dense: whether to keep what the dense model has between two blocks too, for `error`.

    Raises:
        CalibrationError: the model cannot be run block by block; no batches, or of several shapes;
            a linear that cannot be calibrated.
        StudyError: values between blocks have room neither in memory nor on the disk.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any]],
        policy: Policy,
        *,
        dense: bool = False,
    ) -> None:
        traced = TracedModel(model)
        self._args = record(traced, batches)
        if len(traced.graphs) != 1:
            raise CalibrationError(
                f"Dynamo made {len(traced.graphs)} graphs of the model, and calibration needs one: "
                "give batches of one shape, and a model without graph breaks"
            )
        self._gm = copy_graph(traced.graphs[0].tagged)
        run_passes(self._gm, self._args[0], (SelectLinears(policy, traced.tags),))
        found = cuts(self._gm)
        if isinstance(found, str):
            raise CalibrationError(f"the model cannot be run block by block: {found}")
        own = selected(self._gm)
        self._starts = starts(found, own)
        self._linears: list[dict[Node, LinearSite]] = [{} for _ in self._starts]
        for index, (node, site) in own.items():
            number = max(i for i, cut in enumerate(self._starts) if cut.index <= index)
            self._linears[number][node] = site
        first = Part(self._gm, Cut(0, ()), self._starts[0])
        needed = max(cut.bytes for cut in self._starts) * len(self._args) * (2 if dense else 1)
        device = self._starts[0].device
        self._in_files = device.type == "cpu" and not fits(needed, device)
        kept = self._kept()
        self._live: list[Args] = []
        for args in self._args:
            self._live.append(_shared(kept(first(args), args), self._live))
        self._dense_live = list(self._live) if dense else []

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        return len(self._args)

    @torch.no_grad()
    def see(self, number: int) -> list[Seen]:
        """Return a block's selected weights, each with the Hessian of its inputs."""
        linears, inputs = look(self._linears[number])
        nodes = [node for each in inputs for node in each.nodes]
        seen = Part(self._gm, self._starts[number], self._end(number), nodes)
        for args, live in zip(self._args, self._live, strict=True):
            values = iter(seen(args, live))
            for each in inputs:
                each.add(*(next(values) for _ in each.nodes))
        give_back_memory()
        return linears

    @torch.no_grad()
    def advance(
        self,
        number: int,
        rounded: Mapping[str, Tensor],
        transforms: Mapping[str, Transform] = MappingProxyType({}),
    ) -> None:
        """Run a block with rounded weights, up to the next; after the last nothing is kept.

        Inputs of those that are W4A4 are rounded too, under their transforms.
        """
        end = self._end(number)
        if end is None:
            self._live = self._dense_live = []
            return
        changed = self._in_place_of_weights(number, rounded)
        run = Part(self._gm, self._starts[number], end)
        for fqn, each in (round_inputs(run.gm) if rounded else {}).items():
            each.transform = _of_linear(transforms, fqn)
        kept = self._kept()
        for batch, (args, live) in enumerate(zip(self._args, self._live, strict=True)):
            values = kept(run(_replaced(args, changed), live), (*args, *live))
            self._live[batch] = _shared(values, self._live[:batch])
        dense = Part(self._gm, self._starts[number], end) if self._dense_live else None
        for batch, (args, live) in enumerate(zip(self._args, self._dense_live, strict=False)):
            assert dense is not None
            values = kept(dense(args, live), (*args, *live))
            self._dense_live[batch] = _shared(values, self._live)
        give_back_memory()

    def error(self, number: int) -> Error:
        """Return the error of a block's output, as a function of its weights.

        It takes weights, [N, K] each, and their transforms, by path, and the number of a batch. It
        returns the squared error of what the block gives for what comes into it, over the square,
        by what the dense model has there. Inputs of those that are W4A4 are rounded. Gradients
        pass.
        """
        end = self._end(number)
        outputs = None if end is not None else self._after_last()
        run = Part(self._gm, self._starts[number], end, outputs)
        for node in list(run.gm.graph.nodes):
            if node.target is SET_GRAD_ENABLED:  # of code that was traced without
                run.gm.graph.erase_node(node)
        run.gm.recompile()
        with torch.no_grad():
            both = zip(self._args, self._dense_live, strict=True)
            targets = [_floats(run(args, live)) for args, live in both]
        inputs = round_inputs(run.gm)

        def error(
            weights: Mapping[str, Tensor], transforms: Mapping[str, Transform], batch: int
        ) -> Tensor:
            for fqn, each in inputs.items():
                each.transform = _of_linear(transforms, fqn)
            args = _replaced(self._args[batch], self._in_place_of_weights(number, weights))
            found = _floats(run(args, self._live[batch]))
            pairs = zip(found, targets[batch], strict=True)
            power = sum(float(target.square().sum()) for target in targets[batch])
            return torch.stack([(y - target).square().sum() for y, target in pairs]).sum() / power

        return error

    def _in_place_of_weights(self, number: int, weights: Mapping[str, Tensor]) -> dict[int, Tensor]:
        """Return what stands in a block's weights' places among the graph's inputs."""
        changed = {}
        for site in self._linears[number].values():
            assert site.weight is not None
            if len(site.tag.shape) == 3:
                names = [matrix_name(site.tag.fqn, expert) for expert in range(site.tag.shape[0])]
                if not any(name in weights for name in names):
                    continue
                dense = self._args[0][site.weight]
                stack = torch.stack(
                    [
                        weights[name].to(dense.dtype)
                        if name in weights
                        else self.weight(site, expert)
                        for expert, name in enumerate(names)
                    ]
                )
                changed[site.weight] = stack.mT if site.transposed else stack
            elif site.tag.fqn in weights:
                w_NK = weights[site.tag.fqn].to(self._args[0][site.weight].dtype)
                if site.rows is not None:
                    rows = torch.tensor(site.rows, device=w_NK.device)
                    w_NK = self.weight(site).index_copy(0, rows, w_NK[rows])
                changed[site.weight] = w_NK.T if site.transposed else w_NK
        return changed

    def _after_last(self) -> list[Node] | None:
        """Return what the linears after the last block take: unselected heads need not run.

        Of a selected head what it gives.
        """
        nodes = list(self._gm.graph.nodes)[self._starts[-1].index :]
        linears = [(node, site) for node in nodes if (site := site_of(node))]
        inside = [i for i, (_, site) in enumerate(linears) if site.tag.block is not None]
        ends = []
        for node, site in linears[max(inside, default=-1) + 1 :]:
            form = match_linear(node)
            if form is not None:
                ends.append(node if site.scheme else form.x)
        return list(dict.fromkeys(ends)) or None

    def weight(self, site: LinearSite, expert: int | None = None) -> Tensor:
        """Return a linear's dense weight, or an expert's, [N, K]."""
        assert site.weight is not None
        weight: Tensor = self._args[0][site.weight].detach()
        weight = weight if expert is None else weight[expert]
        return weight.T if site.transposed else weight

    def fingerprints(self) -> dict[str, int]:
        """Return a hash of each selected linear's weight, of experts of each one's."""
        found = {}
        for site in (site for block in self._linears for site in block.values()):
            stacked = len(site.tag.shape) == 3
            for expert in range(site.tag.shape[0]) if stacked else (None,):
                w_NK = self.weight(site, expert).contiguous()
                found[matrix_name(site.tag.fqn, expert)] = fingerprint(w_NK)
        return found

    def digest(self) -> str:
        """Return a hash of the graph with all its numbers, of the weights and of the batches."""
        every = [each for args in self._args for each in args]
        graphs = [region.gm for region in regions(self._gm)]
        for graph in graphs:
            taken = (node.target for node in graph.graph.nodes if node.op == "get_attr")
            every += [getattr(graph, str(name), None) for name in taken]
        found = {id(each): each for each in every if isinstance(each, Tensor) and each.numel()}
        tensors = [fingerprint(each) for each in found.values()]
        numbers = [each for each in every if isinstance(each, int | float)]
        return repr((tensors, numbers, [graph.code for graph in graphs]))

    def _kept(self) -> Callable[[Args, Args], Args]:
        """Return what keeps values, those that were given left out, where there is room."""
        if self._in_files:
            return MappedFile(cache_folder()).keep_new
        return lambda values, given: values

    def _end(self, number: int) -> Cut | None:
        return self._starts[number + 1] if number + 1 < len(self._starts) else None


def _replaced(args: Args, changed: Mapping[int, Tensor]) -> Args:
    return tuple(changed.get(index, each) for index, each in enumerate(args))


def _shared(values: Args, before: Sequence[Args]) -> Args:
    """Return values, those that the first batch has too, such as positions and masks, as its."""
    firsts = before[0] if before else values
    return tuple(
        first if isinstance(first, Tensor) and torch.equal(first, each) else each
        for first, each in zip(firsts, values, strict=True)
    )


def _of_linear(transforms: Mapping[str, Transform], fqn: str) -> Transform:
    """Return a linear's transform; experts share one."""
    return transforms[fqn if fqn in transforms else matrix_name(fqn, 0)]


def _floats(values: Any) -> list[Tensor]:
    tensors = (each for each in values if isinstance(each, Tensor) and each.is_floating_point())
    return [each.to(torch.float32) for each in tensors]
