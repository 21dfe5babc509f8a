"""A model traced once and rewritten many times: what `explain` and the studies stand on."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.dynamo import (
    make_room_for_graphs,
    pin_to_owners,
    raiser,
    trace_modules_again,
)
from fp4graph.errors import Fp4GraphError, StudyError
from fp4graph.graph.names import unreached
from fp4graph.graph.norms import norms_of
from fp4graph.graph.regions import copy_graph
from fp4graph.graph.site import sites
from fp4graph.graph_runs import GraphRuns
from fp4graph.packed.stale import bind
from fp4graph.passes.pipeline import (
    OnRefusal,
    bindings,
    check_no_gradients,
    plan_passes,
    rewrite_passes,
    rows,
    run_passes,
)
from fp4graph.passes.tag import TagLinears
from fp4graph.report import LinearRow, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from fp4graph.graph.names import NamedLinear, Names
    from fp4graph.graph.site import LinearSite
    from fp4graph.kernels import Target
    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy

    Tags = tuple[LinearTag, ...]
    Left = tuple[tuple[NamedLinear, str], ...]

_MOST_TRACES = 4


class TracedModel:
    """A model whose linears can be put in FP4 and back without tracing it again.

    Dynamo's trace of a model takes seconds; rewriting a copy of the graph takes a fraction of one.
    The inner compiler is `eager`.

    Args:
        model: any module that torch.compile takes.

    Attributes:
        graphs: what Dynamo made of it so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._tag = TagLinears.of(model)
        self.graphs: list[TracedGraph] = []
        self._policy: Policy | None = None
        self._on_refusal: OnRefusal = "raise"
        self._runs = GraphRuns()
        self._ran: set[TracedGraph] = set()
        self._left: tuple[int, Left] | None = None  # by how many graphs there were
        make_room_for_graphs()
        trace_modules_again(model)
        self._compiled = torch.compile(model, backend=self._capture, dynamic=False)

    def settle(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model until a call is traced no more, and forget what only earlier calls ran.

        The first call of some models makes what later ones use, such as tables of cosines, so that
        it has a graph of its own.

        Raises:
            StudyError: each call is traced anew.
        """
        for _ in range(_MOST_TRACES):
            before = len(self.graphs)
            self._ran.clear()
            out = self(*args, **kwargs)
            if len(self.graphs) == before:
                for graph in self.graphs:
                    if graph not in self._ran:
                        problem = "the model went back to the graph of its first call"
                        graph.run = raiser(StudyError(problem))
                self.graphs = [graph for graph in self.graphs if graph in self._ran]
                self._left = None
                return out
        raise StudyError(
            f"each of {_MOST_TRACES} calls was traced anew: the model changes from call to call"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model as last selected.

        Raises:
            StudyError: no traced graph ran, so the result is the plain model's.
        """
        with self._runs.required():
            return self._compiled(*args, **kwargs)

    def select(self, policy: Policy | None, on_refusal: OnRefusal = "raise") -> Report:
        """Rewrite every traced graph, from its first form; None runs the model as it is.

        Raises:
            SelectorError: a term matches nothing.
            RefusalError: a selected linear cannot run in FP4.
        """
        self._policy, self._on_refusal = policy, on_refusal
        report = Report()
        for graph in self.graphs:
            report.add(graph.rewrite(policy, on_refusal, self.tags))
        report.include(self._unreached(policy))
        return report

    @property
    def tags(self) -> Tags:
        """The linears of all traced graphs."""
        found = (site.tag for graph in self.graphs for _, site in sites(graph.tagged))
        return tuple(dict.fromkeys(found))

    def plan(self, policy: Policy, target: Target | None = None) -> Report:
        """Say what `select` would do, packing and changing nothing; refusals become rows.

        Args:
            policy: what would run how.
            target: the device to choose for; None: where the model is.
        """
        report = Report()
        for graph in self.graphs:
            report.add(graph.plan(policy, self.tags, target))
        report.include(self._unreached(policy))
        return report

    def sites(self, policy: Policy, target: Target | None = None) -> list[LinearSite]:
        """Return the linears that a policy runs in FP4, each once, with rows, kernels and norms."""
        found: dict[str, LinearSite] = {}
        for graph in self.graphs:
            norms = norms_of(graph.tagged, graph.names(self._tag.names))
            for site in graph.planned(policy, self.tags, target):
                if site.kernel is not None:
                    norm = norms.get(site.tag.fqn)
                    found.setdefault(site.tag.fqn, replace(site, norm=norm))
        return list(found.values())

    @property
    def is_whole(self) -> bool:
        """Whether every matrix of the model went into a graph, or the model is one graph."""
        inputs = WeakIdKeyDictionary()
        for graph in self.graphs:
            inputs.update(dict.fromkeys(graph.parameters))
        known = (each in inputs for each in self._model.parameters() if each.ndim > 1)
        return len(self.graphs) == 1 or all(known)

    def release(self) -> None:
        """Let go of the model's weights: Dynamo keeps what it compiled, and that holds them."""
        for graph in self.graphs:
            graph.release()
        self.graphs = []

    def _unreached(self, policy: Policy | None) -> Iterator[LinearRow]:
        """Yield rows of linears in frames that Dynamo runs as they are, or that the call left."""
        if self._left is None or self._left[0] != len(self.graphs):
            reached = WeakIdKeyDictionary()
            for graph in self.graphs:
                reached.update(dict.fromkeys(graph.weights))
            self._left = len(self.graphs), tuple(unreached(self._model, reached))
        for each, reason in self._left[1]:
            selected = policy is not None and policy.decide(each.tag).scheme is not None
            yield LinearRow.of_unreached(each.tag, each.weight.nbytes, reason, selected)

    def _capture(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        run_passes(gm, example_inputs, (self._tag,))
        pin_to_owners(gm)
        graph = TracedGraph(gm, example_inputs)
        self.graphs.append(graph)
        try:
            graph.rewrite(self._policy, self._on_refusal, self.tags)
        except Fp4GraphError as error:
            return raiser(error)

        def run(*args: Any) -> Any:
            self._ran.add(graph)
            return graph.run(*args)

        return self._runs.counted(run)


class TracedGraph:
    """One tagged graph, kept as traced, and its latest rewritten copy.

    Args:
        gm: the graph, tagged.
        example_inputs: real values for its inputs.

    Attributes:
        tagged: the graph.
        run: what computes it now.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.tagged = gm
        self._example_inputs = tuple(example_inputs)
        self.run: Callable[..., Any] = gm.forward

    def release(self) -> None:
        """Forget the values of its inputs; it runs no more."""
        self._example_inputs = ()
        self.run = raiser(StudyError("the traced graph was released"))

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the model that it takes."""
        return (each for each in self._example_inputs if isinstance(each, nn.Parameter))

    @property
    def weights(self) -> Iterator[Tensor]:
        """The weights of its linears, as the model holds them."""
        for _, site in sites(self.tagged):
            if site.weight is not None:
                yield self._example_inputs[site.weight]

    def names(self, known: Names) -> dict[fx.Node, str]:
        """Return the first path of each parameter among its inputs."""
        inputs = (node for node in self.tagged.graph.nodes if node.op == "placeholder")
        pairs = zip(inputs, self._example_inputs, strict=True)
        return {
            node: known[value][0]
            for node, value in pairs
            if isinstance(value, nn.Parameter) and value in known
        }

    @contextmanager
    def running(self, run: Callable[..., Any]) -> Iterator[None]:
        """Let something else compute the graph within: it takes and gives what the graph does."""
        before = self.run
        self.run = run
        try:
            yield
        finally:
            self.run = before

    def plan(self, policy: Policy, universe: Tags, target: Target | None) -> list[LinearRow]:
        """Say what `rewrite` would do; refusals become rows."""
        return rows(self._planned(policy, universe, target))

    def planned(
        self, policy: Policy, universe: Tags, target: Target | None
    ) -> Iterator[LinearSite]:
        """Yield what is known of each linear once kernels are chosen."""
        yield from (site for _, site in sites(self._planned(policy, universe, target)))

    def _planned(self, policy: Policy, universe: Tags, target: Target | None) -> fx.GraphModule:
        copy = copy_graph(self.tagged)
        passes = plan_passes(policy, "keep", universe, target)
        run_passes(copy, self._example_inputs, passes, recompile=False)
        return copy

    def rewrite(
        self, policy: Policy | None, on_refusal: OnRefusal, universe: Tags
    ) -> list[LinearRow]:
        """Rewrite a copy for a policy, None for the graph as it is, and run that from now on."""
        if policy is None:
            self.run = self.tagged.forward
            return rows(self.tagged)
        copy = copy_graph(self.tagged)
        passes = plan_passes(policy, on_refusal, universe)
        run_passes(copy, self._example_inputs, passes, recompile=False)
        found = rows(copy)
        if any(row.selected for row in found):
            check_no_gradients(copy, self._example_inputs)
            run_passes(copy, self._example_inputs, rewrite_passes())
        self.run = bind(copy.forward, bindings(copy), self._example_inputs)
        return found
