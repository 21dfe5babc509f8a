"""Models that own their packed weights: dense linears replaced in place, one at a time."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.compiler import policy_of
from fp4graph.errors import Fp4GraphError, ModelError, OptionError
from fp4graph.kernels import target_of
from fp4graph.memory import give_back_memory
from fp4graph.packed.experts import FP4Experts
from fp4graph.packed.module import PackedModule
from fp4graph.passes.choose import refusal
from fp4graph.replacement import obstacle, packed_module, put
from fp4graph.report import REFUSED, LinearRow, Report
from fp4graph.traced.model import TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fp4graph.formats import BlockFormat
    from fp4graph.graph.site import LinearSite
    from fp4graph.linears.tags import LinearTag
    from fp4graph.passes.pipeline import OnRefusal
    from fp4graph.policy import Policy, Select
    from fp4graph.quantizers import Calibration

LOG = logging.getLogger("fp4graph.convert")
METHOD = "fp4graph"
"""What configurations call it."""
_LENGTH = 8
_REPORT = "fp4graph_report"


def convert(
    model: nn.Module,
    select: Select = "all",
    *,
    format: str | BlockFormat = "nvfp4",
    quantizer: str = "rtn",
    activations: str | None = None,
    kernel: str = "auto",
    on_refusal: OnRefusal = "raise",
    calibration: Calibration | str | Path | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Report:
    """Put a model's selected linears in FP4 for good, in place, and free their dense weights.

    The model needs no torch.compile then, and may have one: its linears are `FP4Linear`s, which
    run the ops that `backend` puts into graphs. One linear is packed at a time, and its dense
    weight is freed at once.

    Args:
        model: the model, on the device where it shall run.
        select: as in `backend`, and it picks the same linears.
        format: as in `backend`.
        quantizer: as in `backend`.
        activations: as in `backend`.
        kernel: as in `backend`.
        on_refusal: as in `backend`; a linear that no module computes by itself is refused too.
        calibration: as in `backend`.
        inputs: a call's keyword arguments, by which linears are found; None: eight tokens. Nothing
            is computed of them.

    Returns:
        a row for each linear, which `report_of(model)` returns later too.

    Raises:
        SelectorError: bad text, a term that matches nothing, or a part of a fused weight.
        OptionError: an option that does not exist.
        RefusalError: a selected linear cannot be converted, and `on_refusal` is "raise"; the model
            is as it was.
        WeightError: a weight holds NaN or Inf; names the linear. Those before it are converted.
        CalibrationError: see `backend`.
    """
    if on_refusal not in ("raise", "keep"):
        raise OptionError(f"on_refusal={on_refusal!r}: expected 'raise' or 'keep'")
    policy = policy_of(select, format, quantizer, activations, kernel, calibration)
    found, report, _ = plan(model, policy, inputs)
    for site in check_refused(model, found, report, on_refusal):
        put(model, site, packed_module(model, site))
        give_back_memory()
    attach(model, report)
    config = getattr(model, "config", None)
    if config is not None:  # so that save_pretrained writes what loads again
        given = facts(policy, on_refusal, smoothed(model), origin(config.name_or_path))
        config.quantization_config = given
    return report


def origin(name: str) -> str:
    """Return a model's name so that it means the same in another folder."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name


def facts(
    policy: Policy, on_refusal: OnRefusal, smoothed: Sequence[str], dense: str
) -> dict[str, Any]:
    """Return what a configuration holds of packed linears: the policy, each entry whole.

    Args:
        policy: what runs how.
        on_refusal: as in `convert`.
        smoothed: paths of linears whose inputs are divided.
        dense: the model that was converted.
    """
    select = {str(selector): scheme and scheme.options for selector, scheme in policy.entries}
    return {
        "quant_method": METHOD,
        "select": select,
        "on_refusal": on_refusal,
        "smoothed": list(smoothed),
        "dense": dense,
        "saved": True,
    }


def smoothed(model: nn.Module) -> list[str]:
    """Return the paths of packed linears whose inputs are divided."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, PackedModule) and module.smooth is not None
    ]


def check_refused(
    model: nn.Module, found: Sequence[LinearSite], report: Report, on_refusal: OnRefusal
) -> list[LinearSite]:
    """Return the linears that can be replaced by modules; the others get their reason in a row.

    Raises:
        RefusalError: there are such, and `on_refusal` is "raise".
    """
    refused = {}
    for site in found:
        reason = obstacle(model, site)
        if reason is not None:
            refused[site.tag.fqn] = reason
    missing = [(row.path, row.reason.removeprefix(REFUSED)) for row in report.refused]
    if (refused or missing) and on_refusal == "raise":
        raise refusal([*missing, *refused.items()])
    for path, reason in refused.items():
        report.include([_dense(report.rows_by_path[path], reason)])
    return [site for site in found if site.tag.fqn not in refused]


def attach(model: nn.Module, report: Report) -> None:
    """Let a model know its report, and how transformers saves it."""
    setattr(model, _REPORT, report)
    if any(isinstance(module, FP4Experts) for module in model.modules()):
        # else it takes stacks apart as it would dense ones, names and tensors
        model._weight_conversions = []  # type: ignore[assignment]


def report_of(model: nn.Module) -> Report:
    """Return the rows of a model that was converted.

    Raises:
        ModelError: it was not.
    """
    report = getattr(model, _REPORT, None)
    if not isinstance(report, Report):
        raise ModelError(
            f"{type(model).__name__} was not converted: fp4graph.convert(model, select) does it, "
            "and a backend has its own report"
        )
    return report


def plan(
    model: nn.Module, policy: Policy, inputs: Mapping[str, Any] | None = None
) -> tuple[list[LinearSite], Report, tuple[LinearTag, ...]]:
    """Return the linears that a policy picks, with their kernels, the rows of all, and their tags.

    A copy of the model is traced that takes no memory for its weights; its values are not needed.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    target = target_of(torch.device("cpu") if device.type == "meta" else device)
    given = inputs or {
        "input_ids": torch.zeros(1, _LENGTH, dtype=torch.int64, device="cpu"), "use_cache": False
    }  # fmt: skip
    traced = _traced(model, given)
    try:
        return traced.sites(policy, target), traced.plan(policy, target), traced.tags
    finally:
        traced.release()


def _traced(model: nn.Module, given: Mapping[str, Any]) -> TracedModel:
    """Trace a model on the meta device, where nothing is computed; or on zeros.

    What a model does may hang on values, which the meta device has not: which experts have tokens.
    """
    try:
        traced = _called(_copied(model, _meta), {name: _meta(each) for name, each in given.items()})
        if traced.is_whole:
            return traced
        traced.release()
    except Fp4GraphError:
        raise
    except Exception:  # models' own code: some makes tensors of its own, on no device but its own
        LOG.debug("not traced on meta", exc_info=True)
    return _called(_copied(model, _zeros), {name: _on_cpu(each) for name, each in given.items()})


def _called(model: nn.Module, given: Mapping[str, Any]) -> TracedModel:
    traced = TracedModel(model)
    with torch.no_grad():
        traced(**given)
    return traced


def _copied(model: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    """Return a copy of a model with other tensors."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): change(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo).eval()


def _meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.to("meta") if isinstance(value, Tensor) else value


def _zeros(value: Tensor) -> Tensor:
    """Return zeros in a tensor's place; a parameter's take the memory of one."""
    if isinstance(value, nn.Parameter):
        zero = torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape)
        return nn.Parameter(zero, requires_grad=False)
    if value.device.type == "meta":
        return torch.zeros(value.shape, dtype=value.dtype, device="cpu")
    return value.detach().cpu().clone()


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _dense(row: LinearRow, reason: str) -> LinearRow:
    return replace(
        row, selected=False, kernel=None, bytes_packed=None, layout=None, tile=None, rows=None,
        reason=f"{REFUSED}{reason}",
    )  # fmt: skip
