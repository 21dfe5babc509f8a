"""The torch.compile backend: Dynamo's graph in, the inner compiler's callable out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fp4graph.errors import Fp4GraphError, OptionError, SelectorError
from fp4graph.passes.dynamo import make_room_for_recompiles, pin_to_module
from fp4graph.passes.names import named_linears
from fp4graph.passes.pipeline import (
    OnRefusal,
    bind,
    bindings,
    check_no_gradients,
    plan_passes,
    rewrite_passes,
    rows,
    run_passes,
)
from fp4graph.passes.site import sites
from fp4graph.passes.tag import TagLinears
from fp4graph.policy import Policy, Scheme, Select
from fp4graph.report import Report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn
    from torch.fx import GraphModule

    from fp4graph.formats import BlockFormat

    CompilerFn = Callable[..., Callable[..., Any]]

_INNER = ("inductor", "eager")


class Backend:
    """A compiler for `torch.compile(model, backend=...)`; made by `backend()`.

    Attributes:
        policy: what runs how.
        report: one row for each linear of the graphs compiled so far.
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
        self._inner = inner
        self._on_refusal = on_refusal
        self._tag = TagLinears.of(model)
        self._universe = (
            tuple(each.tag for each in named_linears(model)) if model is not None else None
        )
        self._num_blocks: int | None = None
        make_room_for_recompiles()

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
            mode = _read_mode(kwargs)
            return self._compile(gm, example_inputs, mode)
        except Fp4GraphError as error:
            return _raiser(error)

    def _compile(
        self, gm: GraphModule, example_inputs: Sequence[Any], mode: str | None
    ) -> Callable[..., Any]:
        plan = plan_passes(self.policy, self._on_refusal, self._universe)
        run_passes(gm, example_inputs, (self._tag, *plan))
        self._check_num_blocks(gm)
        found = rows(gm)
        if found:
            pin_to_module(gm)
        if any(row.selected for row in found):
            check_no_gradients(example_inputs)
            run_passes(gm, example_inputs, rewrite_passes())
        bound = bindings(gm)
        self.report.add(found)
        return bind(_compile_inner(self._inner, gm, example_inputs, mode), bound)

    def _check_num_blocks(self, gm: GraphModule) -> None:
        """Refuse to count blocks from the end of what turns out to be a fragment of the model."""
        total = max((site.tag.num_blocks or 0 for _, site in sites(gm)), default=0)
        if self._universe is not None or not total:
            return
        if self._num_blocks not in (None, total) and self.policy.counts_from_end:
            raise SelectorError(
                str(self.policy),
                f"graphs with {self._num_blocks} and {total} blocks were seen, so negative block "
                "indexes are in doubt: pass model= to backend(), one backend for each model",
            )
        self._num_blocks = total


def backend(
    select: Select = "all",
    *,
    format: str | BlockFormat = "nvfp4",
    quantizer: str = "rtn",
    activations: str | None = None,
    kernel: str = "auto",
    inner: str | CompilerFn = "inductor",
    on_refusal: OnRefusal = "raise",
    calibration: object | None = None,
    model: nn.Module | None = None,
    report: Report | None = None,
) -> Backend:
    """Make a torch.compile backend that runs the selected linears in FP4.

    Everything that is not selected reaches the inner compiler as Dynamo made it, so
    `select="none"` is bit-identical to the inner compiler alone. The model's weights stay in
    memory: the packed ones come on top.

    Args:
        select: a selector, or a mapping from selector to a format's name, to a dict of `format`,
            `quantizer`, `activations`, `kernel`, or to None for dense; later entries win.
        format: `nvfp4`, `mxfp4`, or `mxfp4:RULE` with a scale rule (floor, ceil, rceil, even).
        quantizer: how codes are found: `rtn`, round to nearest.
        activations: None for W4A16; `same` to quantise and dequantise each linear's input in the
            weight's format, at each call (W4A4).
        kernel: `auto`, or a kernel's name.
        inner: `inductor`, `eager`, or a backend function that compiles the rewritten graph.
        on_refusal: what to do with a selected linear that cannot run in FP4: `raise`, or `keep`
            it dense with a row in the report.
        calibration: None; `rtn` takes none.
        model: the model. Needed where Dynamo sees only fragments of it (graph breaks, single
            layers compiled alone), to know whole module paths and the number of blocks.
        report: filled with one row for each linear; the backend's `report` attribute if None.

    Returns:
        a callable for `torch.compile(backend=...)`.

    Raises:
        SelectorError: `select` cannot be parsed. A term that matches nothing raises at the first
            call of the compiled model.
        OptionError: an option that does not exist.
    """
    if on_refusal not in ("raise", "keep"):
        raise OptionError(f"on_refusal={on_refusal!r}: expected 'raise' or 'keep'")
    if isinstance(inner, str) and inner not in _INNER:
        raise OptionError(f"inner={inner!r}: expected {', '.join(_INNER)} or a backend function")
    if calibration is not None:
        raise OptionError(f"calibration= is given, but quantizer {quantizer!r} takes none")
    scheme = Scheme.of(format, quantizer, activations, kernel)
    report = Report() if report is None else report
    return Backend(Policy.of(select, scheme), inner, on_refusal, model, report)


def dynamo_backend(
    gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any
) -> Callable[..., Any]:
    """Serve `torch.compile(model, backend="fp4graph", options={"select": "attn"})`.

    Options are the arguments of `backend`; one that does not exist raises OptionError.
    """
    options = dict(kwargs.pop("options", None) or {})
    try:
        try:
            made = backend(**options)
        except TypeError as error:
            problem = str(error).replace(
                "backend() got an unexpected keyword argument", "no such option:"
            )
            raise OptionError(problem) from None
    except Fp4GraphError as error:
        return _raiser(error)
    return made(gm, example_inputs, **kwargs)


def _read_mode(kwargs: dict[str, Any]) -> str | None:
    unknown = sorted(name for name, value in kwargs.items() if name != "mode" and value)
    if unknown:
        raise OptionError(
            f"torch.compile passed {unknown[0]}={kwargs[unknown[0]]!r}, which backend() does not "
            'take: give options to backend(...), or name the backend: backend="fp4graph"'
        )
    mode = kwargs.get("mode")
    return None if mode in (None, "default") else str(mode)


def _compile_inner(
    inner: str | CompilerFn, gm: GraphModule, example_inputs: Sequence[Any], mode: str | None
) -> Callable[..., Any]:
    if inner == "eager":
        return gm.forward
    if inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode else None
        return cast(
            "Callable[..., Any]", compile_fx(gm, list(example_inputs), config_patches=patches)
        )
    assert callable(inner)
    return inner(gm, example_inputs)


def _raiser(error: Fp4GraphError) -> Callable[..., Any]:
    def raise_error(*args: Any) -> Any:
        raise error.with_traceback(None)

    return raise_error
