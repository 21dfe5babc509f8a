"""Dense modules and parameters replaced by ones that own packed weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.formats import PackedWeight
from fp4graph.packed.experts import FP4Experts
from fp4graph.packed.linear import FP4Linear
from fp4graph.packed.packing import pack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fp4graph.graph.site import LinearSite
    from fp4graph.packed.module import PackedModule


def obstacle(model: nn.Module, site: LinearSite) -> str | None:
    """Return why a linear cannot be replaced by a module; None if it can."""
    path = site.tag.fqn
    try:
        found = _found(model, site)
    except AttributeError:
        return "no module of its own computes it"
    weight = found if site.is_stack else getattr(found, "weight", None)
    dims = 3 if site.is_stack else 2
    if isinstance(found, nn.Module) and (not isinstance(weight, Tensor) or _has_children(found)):
        return f"a {type(found).__name__} computes it, which is more than a linear"
    if not isinstance(weight, Tensor) or weight.ndim != dims:
        return f"{path} is no parameter of {dims} dimensions"
    if site.tag.shape != tuple(weight.mT.shape if site.transposed else weight.shape):
        return f"its weight is {list(weight.shape)}, and the graph has {list(site.tag.shape)}"
    return None


def _has_children(module: nn.Module) -> bool:
    return len(list(module.children())) > 0


def _found(model: nn.Module, site: LinearSite) -> Any:
    """Return what is replaced: a linear's module, or a stack's parameter."""
    if not site.is_stack:
        return model.get_submodule(site.tag.fqn)
    return model.get_parameter(site.tag.fqn)


@torch.no_grad()
def packed_module(model: nn.Module, site: LinearSite, *, prepare: bool = True) -> PackedModule:
    """Return what comes in the place of a linear; `prepare` as in `PackedModule`.

    Raises:
        WeightError: the weight holds NaN or Inf; names the linear.
    """
    assert site.scheme is not None
    fqn, scheme = site.tag.fqn, site.scheme
    found = _found(model, site)
    stored: Tensor = (found if site.is_stack else found.weight).detach()
    smooth = scheme.calibration.smooth.get(fqn) if scheme.calibration is not None else None
    oriented = stored.mT if site.transposed else stored
    if site.is_stack:
        weights = (pack(each, scheme, fqn, expert=e) for e, each in enumerate(oriented))
        return _experts(weights, stored, site, smooth, prepare=prepare)
    bias: Any = getattr(found, "bias", None)
    rest = None
    packed = pack(oriented, scheme, fqn, rows=site.rows)
    if site.rows is not None:
        rest, bias = _rest(oriented, bias, site.rows)
    facts = (scheme, stored.dtype, bias, smooth, site.rows, rest)
    return FP4Linear(packed, *facts, transposed=site.transposed, prepare=prepare)


def hollow_module(model: nn.Module, site: LinearSite, *, smoothed: bool) -> PackedModule:
    """Return the same on the meta device, whose values are yet to come.

    Args:
        model: the model.
        site: the linear.
        smoothed: whether its inputs are divided.
    """
    assert site.scheme is not None
    found = _found(model, site)
    stored: Tensor = found if site.is_stack else found.weight
    *_, N, K = site.tag.shape
    smooth = torch.empty(K, device="meta", dtype=torch.float32) if smoothed else None
    if site.is_stack:
        weights = (_hollow((N, K), site) for _ in range(site.tag.shape[0]))
        return _experts(weights, stored, site, smooth, prepare=False)
    bias: Any = getattr(found, "bias", None)
    rest = None
    if site.rows is not None:
        N = len(site.rows)
        others = site.tag.shape[0] - N
        rest = nn.Linear(K, others, bias is not None, device="meta", dtype=stored.dtype)
        bias = None if bias is None else bias[:N]
    facts = (site.scheme, stored.dtype, bias, smooth, site.rows, rest)
    hollow = _hollow((N, K), site)
    return FP4Linear(hollow, *facts, transposed=site.transposed, prepare=False)


def _experts(
    weights: Iterator[PackedWeight],
    stored: Tensor,
    site: LinearSite,
    smooth: Tensor | None,
    *,
    prepare: bool,
) -> FP4Experts:
    assert site.scheme is not None
    E, first, second = stored.shape
    facts = ((E, first, second), site.scheme, stored.dtype, smooth)
    return FP4Experts(weights, *facts, transposed=site.transposed, prepare=prepare)


def _hollow(shape: tuple[int, int], site: LinearSite) -> PackedWeight:
    assert site.scheme is not None
    format = site.scheme.format
    groups = -(-shape[1] // format.block_size)
    with torch.device("meta"):
        return PackedWeight(
            torch.empty(shape[0], groups * format.block_size // 2, dtype=torch.uint8),
            torch.empty(shape[0], groups, dtype=format.scale_codec.dtype),
            torch.empty((), dtype=torch.float32) if format.has_per_tensor_scale else None,
            shape,
            format,
        )


def put(model: nn.Module, site: LinearSite, new: PackedModule) -> None:
    """Put a module in the place of a linear's, wherever that stands, or of a stack's parameter.

    A head that was tied to the embeddings is so no more, and transformers is told.
    """
    path = site.tag.fqn
    tied = getattr(model, "all_tied_weights_keys", {})
    if tied.pop(f"{path}.weight", None) is not None and not tied:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    if site.is_stack:
        owner, _, name = path.rpartition(".")
        delattr(model.get_submodule(owner), name)
        model.get_submodule(owner).register_module(name, new)
        return
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
