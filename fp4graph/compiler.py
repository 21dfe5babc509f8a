"""The torch.compile backend: Dynamo's graph in, the inner compiler's callable out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch.utils.weak import WeakIdKeyDictionary

from fp4graph.dynamo import (
    CallWatch,
    GraphCount,
    called_module,
    make_room_for_graphs,
    pin_to_owners,
    raiser,
    trace_modules_again,
)
from fp4graph.errors import Fp4GraphError, OptionError, RefusalError, SelectorError
from fp4graph.graph.names import model_lists, named_linears, parameter_names, unreached
from fp4graph.graph.site import sites, unmark
from fp4graph.graph_runs import GraphRuns
from fp4graph.inner import NAMES, compile_inner, read_mode
from fp4graph.linears.stacks import Stacks, below_block, list_of
from fp4graph.linears.tags import Role
from fp4graph.packed.stale import bind
from fp4graph.passes.choose import refusal
from fp4graph.passes.merge import MergeLinears, merges
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
from fp4graph.policy import Policy, Select
from fp4graph.private import required_call
from fp4graph.quantizers import Calibration
from fp4graph.report import LinearRow, Report
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping, Sequence

    from torch import Tensor, nn
    from torch.fx import GraphModule

    from fp4graph.formats import BlockFormat
    from fp4graph.inner import CompilerFn
    from fp4graph.linears.tags import LinearTag
    from fp4graph.packed.cache import PackEntry

_FRAGMENT = (
    "if torch.compile split the model (graph breaks, layers compiled alone), "
    "pass model= to backend() so that paths are whole"
)


class Backend:
    """A compiler for `torch.compile(model, backend=...)`; made by `backend()`.

    Attributes:
        policy: what runs how.
        report: one row for each linear of the graphs compiled so far.
        runs: how often they ran.
        watch: follows the calls of the functions that it compiles for.
    """

    def __init__(
        self,
        policy: Policy,
        inner: str | CompilerFn,
        on_refusal: OnRefusal,
        model: nn.Module | None,
        report: Report,
    ) -> None:
        self.policy = policy
        self.report = report
        self.runs = GraphRuns()
        self._inner = inner
        self._on_refusal = on_refusal
        self._model = model
        self._paths: set[str] = set()
        self._tags: dict[str, LinearTag] = {}
        self._stacks = Stacks()
        self._graphs = GraphCount()
        self._entries: WeakSet[PackEntry] = WeakSet()
        self._reached: MutableMapping[Tensor, None] = WeakIdKeyDictionary()
        self._failed: Fp4GraphError | None = None
        self.watch = CallWatch(self._raise_again, self._check_call, self.runs)
        make_room_for_graphs()
        trace_modules_again(model)

    def __repr__(self) -> str:
        return f"<fp4graph backend: {self.policy}; {self.report.summary}>"

    def __call__(
        self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any
    ) -> Callable[..., Any]:
        """Compile one graph.

        Args:
            gm: the graph, as Dynamo calls a backend.
            example_inputs: its real inputs.
            kwargs: `mode`, as torch.compile passes it on; given to Inductor.

        Returns:
            the compiled graph. An error of the user's comes out of the first call instead of here,
            where Dynamo would wrap it in one of its own.
        """
        try:
            mode = read_mode(kwargs)
            self._graphs.add(gm, example_inputs)
            run = self._compile(gm, example_inputs, mode)
            self.watch.follow(required_call())
        except Fp4GraphError as error:
            return raiser(error)
        return run

    def refresh(self) -> None:
        """Pack again whatever changed, by content: every value of every packed weight is compared.

        Calls notice by themselves what moves a counter or a probe (docs/passes.md). A write to a
        few values through `.data` moves neither: call this after one.
        """
        for entry in list(self._entries):
            entry.refresh()

    def reset(self) -> None:
        """Forget how many graphs were compiled; called by `torch._dynamo.reset()`."""
        self._graphs.clear()

    def _compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], mode: str | None
    ) -> Callable[..., Any]:
        self._tag(gm, example_inputs)
        self._tags.update({site.tag.fqn: site.tag for _, site in sites(gm)})
        universe = self._universe()
        run_passes(gm, example_inputs, plan_passes(self.policy, self._on_refusal, universe))
        self._check_stacks(gm)
        found = rows(gm)
        if found:
            pin_to_owners(gm)
        if any(row.selected for row in found):
            check_no_gradients(gm, example_inputs)
            run_passes(gm, example_inputs, rewrite_passes())
            found = rows(gm)  # which now know whom they were merged with
        elif merges(gm):  # a converted model
            run_passes(gm, example_inputs, (MergeLinears(),))
        bound = bindings(gm)
        self._entries.update(binding.entry for binding in bound)
        self._reached.update(
            {example_inputs[site.weight]: None for _, site in sites(gm) if site.weight is not None}
        )
        if universe is not None:  # layers may have gone since the last graph
            paths = {tag.fqn for tag in universe}
            self.report.drop(self._paths - paths)
            self._paths = paths
        self.report.add(found)
        run = compile_inner(self._inner, gm, example_inputs, mode)
        return self.runs.counted(bind(run, bound, example_inputs))

    def _tag(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        """Tag a graph; where it is a fragment, by the paths of the module that is called."""
        run_passes(gm, example_inputs, (TagLinears.of(self._model),), recompile=False)
        called = None if self._model is not None else called_module()
        if called is None:
            return
        paths = set().union(*parameter_names(called).values())
        if not all(site.tag.fqn in paths for _, site in sites(gm)):
            unmark(gm)
            run_passes(gm, example_inputs, (TagLinears.of(called),), recompile=False)

    def _universe(self) -> tuple[LinearTag, ...] | None:
        """Return the model's linears: as graphs have them, as a sibling's graph has, by name."""
        if self._model is None:
            return None
        lists = model_lists(self._model)

        def kind(tag: LinearTag) -> tuple[str | None, str]:
            return list_of(tag.fqn, lists), below_block(tag.fqn, lists)

        roles = {kind(tag): tag.role for tag in self._tags.values() if tag.block is not None}
        tags = []
        for each in named_linears(self._model):
            tag = each.tag
            if tag.role is Role.OTHER and tag.block is not None:
                tag = replace(tag, role=roles.get(kind(tag), tag.role))
            tags.append(self._tags.get(tag.fqn, tag))
        return tuple(tags)

    def _raise_again(self) -> None:
        if self._failed is not None:
            raise self._failed.with_traceback(None)

    def _check_call(self, modules: tuple[nn.Module, ...]) -> None:
        """See to it that what is selected was in some graph, when a call ends.

        Raises:
            SelectorError: without a model, a term matched nothing in all graphs so far.
            RefusalError: it was not, and `on_refusal` is "raise".
        """
        if self.policy.is_none:
            return
        if self._model is None:
            self._failed = self._check_fragments()
        else:
            self._check_reached(self._model, modules)
        self._raise_again()

    def _check_fragments(self) -> Fp4GraphError | None:
        tags = tuple(self._tags.values())
        if not tags:
            return RefusalError(
                f"selector {str(self.policy)!r} picked nothing: Dynamo's {self.report.graphs} "
                "graphs hold no linear that fp4graph knows; pass model= to backend() to learn "
                "where the model's linears went"
            )
        try:
            self.policy.check(tags)
        except SelectorError as error:
            return error if any(tag.block == 0 for tag in tags) else error.with_hint(_FRAGMENT)
        return None

    def _check_reached(self, model: nn.Module, modules: tuple[nn.Module, ...]) -> None:
        inside = {id(p) for module in modules for p in module.parameters()}
        tags = {tag.fqn: tag for tag in self._universe() or ()}
        missing, rows = [], []
        for each, reason in unreached(model, self._reached):
            if not inside or id(each.weight) in inside:
                selected = self.policy.decide(tags[each.tag.fqn]).scheme is not None
                missing += [(each.tag.fqn, reason)] if selected else []
                rows.append(LinearRow.of_unreached(each.tag, each.weight.nbytes, reason, selected))
        if missing and self._on_refusal == "raise":
            self._failed = refusal(missing)
            return
        self.report.include(rows)

    def _check_stacks(self, gm: GraphModule) -> None:
        """Refuse to guess from a fragment: how many blocks there are, which stack is the main one.

        Raises:
            SelectorError: graphs differ in what the selection depends on, and there is no model.
        """
        before, now = self._stacks, Stacks.of(site.tag for _, site in sites(gm))
        if self._model is not None or not now.blocks:
            return
        self._stacks = now
        moved = before.main not in (None, now.main)
        recounted = self.policy.counts_from_end and dict(before.blocks) != dict(now.blocks)
        if before.blocks and (moved or recounted):
            doubt = "which stack is the main one is" if moved else "negative block indexes are"
            raise SelectorError(
                str(self.policy),
                f"graphs with blocks {before} and {now} were seen, so {doubt} in doubt: "
                "pass model= to backend(), one backend for each model",
            )


def backend(
    select: Select = "all",
    *,
    format: str | BlockFormat = "nvfp4",
    quantizer: str = "rtn",
    activations: str | None = None,
    kernel: str = "auto",
    inner: str | CompilerFn = "inductor",
    on_refusal: OnRefusal = "raise",
    calibration: Calibration | str | Path | None = None,
    model: nn.Module | None = None,
    report: Report | None = None,
) -> Backend:
    """Make a torch.compile backend that runs the selected linears in FP4.

    Everything that is not selected reaches the inner compiler as Dynamo made it, so
    `select="none"` is bit-identical to the inner compiler alone. The model's weights stay in
    memory: the packed ones come on top.

    Args:
        select: a selector, or a mapping from selector to a format's name, to a dict of `format`,
            `quantizer`, `activations`, `kernel`, or to None for dense; later entries win. A
            `Policy` stands as it is, whatever `format` and the like say.
        format: `nvfp4`, `mxfp4`, or `mxfp4:RULE` with a scale rule (floor, ceil, rceil, even).
        quantizer: how codes are found: `rtn`, round to nearest; `scale-search`, the best
            scale for each group; docs/numerics.md has all. With a calibration it is that one's own.
        activations: None or `none` leaves inputs as they are (W4A16). `same` quantises and
            dequantises each linear's input in the weight's format at each call (W4A4). `int8` lets
            the kernel round it to 8 bits in groups, an approximation (W4A8); `auto` lets it do so
            from as many rows on as that gains a tenth of the time on this machine.
        kernel: `auto`, or a kernel's name.
        inner: `inductor`, `eager`, or a backend function that compiles the rewritten graph.
        on_refusal: what to do with a selected linear that cannot run in FP4: `raise`, or `keep`
            it dense with a row in the report.
        calibration: codes found with data, from `fp4graph.calibrate`, or the file that holds them;
            every selected linear takes them.
        model: the model. Needed where Dynamo sees only fragments of it (graph breaks, single
            layers compiled alone), to know whole module paths and the number of blocks.
        report: filled with one row for each linear; the backend's `report` attribute if None.

    Returns:
        a callable for `torch.compile(backend=...)`.

    Raises:
        SelectorError: `select` cannot be parsed. A term that matches nothing raises at the first
            call of the compiled model.
        OptionError: an option that does not exist.
        CalibrationError: a calibration that cannot be read, or is for another format. One that
            lacks a linear, or was made of other weights, raises at the first call.
    """
    if on_refusal not in ("raise", "keep"):
        raise OptionError(f"on_refusal={on_refusal!r}: expected 'raise' or 'keep'")
    if isinstance(inner, str) and inner not in NAMES:
        raise OptionError(f"inner={inner!r}: expected {', '.join(NAMES)} or a backend function")
    policy = policy_of(select, format, quantizer, activations, kernel, calibration)
    report = Report() if report is None else report
    return Backend(policy, inner, on_refusal, model, report)


def policy_of(
    select: Select,
    format: str | BlockFormat,
    quantizer: str,
    activations: str | None,
    kernel: str,
    calibration: Calibration | str | Path | None,
) -> Policy:
    """Read what runs how; arguments and errors as in `backend`."""
    scheme = Scheme.read(format, quantizer, activations, kernel)
    codes = _codes(calibration)
    policy = Policy.of(select, scheme, codes)
    if codes and not any(each.calibration for each in policy.schemes):
        made = " and ".join(f"{each} by {how}" for each, how in codes[0].ways)
        asked = " and ".join(f"{each.format} by {each.quantizer}" for each in policy.schemes)
        raise OptionError(f"{asked} is asked for, and the calibration has {made}")
    return policy


def _codes(given: object) -> tuple[Calibration, ...]:
    """Return a calibration as it is given, or as its file holds it; none where none is given."""
    found = Calibration.load(given) if isinstance(given, str | Path) else given
    if found is None:
        return ()
    if not isinstance(found, Calibration):
        problem = "expected a Calibration or the file that holds one"
        raise OptionError(f"calibration={given!r}: {problem}")
    return (found,)
