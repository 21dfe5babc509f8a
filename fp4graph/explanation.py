"""What a selection would do to a model, without doing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fp4graph.errors import ModelError
from fp4graph.kernels import parse_target
from fp4graph.policy import Policy, Select
from fp4graph.scheme import Scheme
from fp4graph.traced.model import TracedModel

if TYPE_CHECKING:
    from fp4graph.formats import BlockFormat
    from fp4graph.report import Report


def explain(
    model: nn.Module,
    *args: Any,
    select: Select = "all",
    format: str | BlockFormat = "nvfp4",
    quantizer: str = "rtn",
    activations: str | None = None,
    kernel: str = "auto",
    device: str | None = None,
    **kwargs: Any,
) -> Report:
    """Trace a model, tag its linears, select and choose kernels; compile and pack nothing.

    Args:
        model: the model; called once, dense, with `args` and `kwargs`.
        args: positional inputs, for example the token ids, int64 [batch, sequence].
        select: as in `backend`.
        format: as in `backend`.
        quantizer: as in `backend`.
        activations: as in `backend`.
        kernel: as in `backend`.
        device: a device to choose kernels for that need not be here, `cpu` or one such as
            `cuda:sm_90` (see `fp4graph inspect --help`); None for where the weights are, and for
            this CPU if they are on the meta device.
        kwargs: further inputs of the model.

    Returns:
        one row for each linear; a selected linear that cannot run in FP4 is a row with the reason.

    Raises:
        SelectorError: bad text, a term that matches nothing, or a part of a fused weight.
        OptionError: an option or a device that does not exist.
        ModelError: no module; or one whose linears Dynamo does not show.
    """
    other: object = model  # the annotation is no promise
    if not isinstance(other, nn.Module):
        hint = ": fp4graph.models.load(name).model is one" if isinstance(other, str) else ""
        raise ModelError(f"model={other!r} is no torch.nn.Module{hint}")
    policy = Policy.of(select, Scheme.read(format, quantizer, activations, kernel))
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        device = device or "cpu"
        args, kwargs = tree_map_only(torch.Tensor, _to_meta, (args, kwargs))
    target = None if device is None else parse_target(device)
    traced = TracedModel(model)
    with torch.no_grad():
        traced(*args, **kwargs)
    report = traced.plan(policy, target)
    if not len(report) and any(isinstance(each, nn.Linear) for each in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has linears, and no traced graph has one: Dynamo skips code "
            "of torch's own, for good where it once did; call it within a module or function of "
            "your own"
        )
    return report


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")
