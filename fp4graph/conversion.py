"""Models that own their packed weights: dense linears replaced in place, one at a time."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.compiler import policy_of
from fp4graph.errors import Fp4GraphError, ModelError, OptionError
from fp4graph.kernels import target_of
from fp4graph.memory import give_back_memory
from fp4graph.packed.linear import FP4Linear
from fp4graph.packed.packing import pack
from fp4graph.passes.choose import refusal
from fp4graph.report import REFUSED, LinearRow, Report
from fp4graph.traced.model import TracedModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fp4graph.formats import BlockFormat
    from fp4graph.graph.site import LinearSite
    from fp4graph.passes.pipeline import OnRefusal
    from fp4graph.policy import Policy, Select
    from fp4graph.quantizers import Calibration

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
    found, report = plan(model, policy, inputs)
    for site in check_refused(model, found, report, on_refusal):
        module = model.get_submodule(site.tag.fqn)
        replace_linear(model, site.tag.fqn, packed_linear(module, site))
        del module
        give_back_memory()
    attach(model, report)
    config = getattr(model, "config", None)
    if config is not None:  # so that save_pretrained writes what loads again
        config.quantization_config = facts(policy, on_refusal, smoothed(model))
    return report


def facts(policy: Policy, on_refusal: OnRefusal, smoothed: Sequence[str]) -> dict[str, Any]:
    """Return what a configuration holds of packed linears: the policy, each entry whole."""
    select = {str(selector): scheme and scheme.options for selector, scheme in policy.entries}
    return {
        "quant_method": METHOD,
        "select": select,
        "on_refusal": on_refusal,
        "smoothed": list(smoothed),
        "saved": True,
    }


def smoothed(model: nn.Module) -> list[str]:
    """Return the paths of packed linears whose inputs are divided."""
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, FP4Linear) and module.smooth is not None
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
        reason = _obstacle(model, site)
        if reason is not None:
            refused[site.tag.fqn] = reason
    missing = [(row.path, row.reason.removeprefix(REFUSED)) for row in report.refused]
    if (refused or missing) and on_refusal == "raise":
        raise refusal([*missing, *refused.items()])
    for path, reason in refused.items():
        report.include([_dense(report.rows_by_path[path], reason)])
    return [site for site in found if site.tag.fqn not in refused]


def attach(model: nn.Module, report: Report) -> None:
    """Let a model know its report."""
    setattr(model, _REPORT, report)


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
) -> tuple[list[LinearSite], Report]:
    """Return the linears that a policy picks, with their kernels, and the rows of all.

    The model is traced on the meta device, where no weight is read; one whose code cannot run there
    is traced where it is.
    """
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    target = target_of(torch.device("cpu") if device.type == "meta" else device)
    given = inputs or {
        "input_ids": torch.zeros(1, _LENGTH, dtype=torch.int64, device="cpu"), "use_cache": False
    }  # fmt: skip
    try:
        traced = TracedModel(_outline(model))
        with torch.no_grad():
            traced(**{name: _meta(value) for name, value in given.items()})
    except Fp4GraphError:
        raise
    except Exception:  # models' own code: some makes tensors of its own, on no device but its own
        traced = TracedModel(model)
        with torch.no_grad():
            traced(**{name: _moved(value, device) for name, value in given.items()})
    try:
        return traced.sites(policy, target), traced.plan(policy, target)
    finally:
        traced.release()


def _outline(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors are on the meta device."""
    tensors = (*model.parameters(), *model.buffers())
    memo: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in tensors}
    return copy.deepcopy(model, memo).eval()


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.to("meta") if isinstance(value, Tensor) else value


def _obstacle(model: nn.Module, site: LinearSite) -> str | None:
    """Return why a linear cannot be replaced by a module; None if it can."""
    try:
        module = model.get_submodule(site.tag.fqn)
    except AttributeError:
        return "no module of its own computes it"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or len(list(module.children())):
        return f"a {type(module).__name__} computes it, which is more than a linear"
    if site.tag.shape != tuple(weight.T.shape if site.transposed else weight.shape):
        return f"its weight is {list(weight.shape)}, and the graph has {list(site.tag.shape)}"
    return None


def _dense(row: LinearRow, reason: str) -> LinearRow:
    return replace(
        row, selected=False, kernel=None, bytes_packed=None, layout=None, tile=None, rows=None,
        reason=f"{REFUSED}{reason}",
    )  # fmt: skip


@torch.no_grad()
def packed_linear(module: nn.Module, site: LinearSite, *, prepare: bool = True) -> FP4Linear:
    """Return what comes in the place of a linear's module; `prepare` as in `FP4Linear`.

    Raises:
        WeightError: the weight holds NaN or Inf; names the linear.
    """
    assert site.scheme is not None
    stored: Any = module.weight
    bias: Any = getattr(module, "bias", None)
    w_NK = stored.detach().T if site.transposed else stored.detach()
    rest, smooth = None, None
    if site.scheme.calibration is not None:
        smooth = site.scheme.calibration.smooth.get(site.tag.fqn)
    packed = pack(w_NK, site.scheme, site.tag.fqn, rows=site.rows)
    if site.rows is not None:
        rest, bias = _rest(w_NK, bias, site.rows)
    facts = (site.scheme, stored.dtype, bias, smooth, site.rows, rest)
    return FP4Linear(packed, *facts, prepare=prepare)


def replace_linear(model: nn.Module, path: str, new: FP4Linear) -> None:
    """Put a module in the place of another, wherever that stands.

    A head that was tied to the embeddings is so no more, and transformers is told.
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    if tied.pop(f"{path}.weight", None) is not None and not tied:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    old = model.get_submodule(path)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def _rest(
    w_NK: Tensor, bias: Tensor | None, rows: tuple[int, ...]
) -> tuple[nn.Linear, Tensor | None]:
    """Return the dense linear of all other rows of a fused weight, and the bias of these."""
    chosen = torch.zeros(len(w_NK), dtype=torch.bool, device=w_NK.device)
    chosen[list(rows)] = True
    with torch.device("meta"):
        rest = nn.Linear(w_NK.shape[1], len(w_NK) - len(rows), bias is not None)
    rest.weight = nn.Parameter(w_NK[~chosen].contiguous(), requires_grad=False)
    if bias is None:
        return rest, None
    rest.bias = nn.Parameter(bias[~chosen].contiguous(), requires_grad=False)
    return rest, bias[chosen].contiguous()
