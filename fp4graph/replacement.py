"""Dense linears replaced by modules that own packed weights.

An `nn.Linear` that is called is replaced by an `FP4Linear`. Any other module keeps its own forward,
and its parameter alone is replaced, for nothing is known of what it computes besides the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.formats import PackedWeight
from fp4graph.packed.experts import FP4Experts
from fp4graph.packed.linear import FP4Linear
from fp4graph.packed.module import PackedModule
from fp4graph.packed.packing import pack

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp4graph.graph.site import LinearSite


@dataclass(frozen=True)
class Place:
    """Where a linear's weight is in a model.

    Attributes:
        owner: path of the module that holds it.
        name: of the parameter in that.
        is_linear: whether that is an `nn.Linear` which is called, and not just read.
    """

    owner: str
    name: str
    is_linear: bool

    @property
    def parameter(self) -> str:
        """Its whole name."""
        return f"{self.owner}.{self.name}".removeprefix(".")

    def of(self, model: nn.Module) -> nn.Module:
        """Return the module that holds it."""
        return model.get_submodule(self.owner)


def place_of(model: nn.Module, site: LinearSite) -> Place | None:
    """Return where a linear's weight is; None where no parameter has its path."""
    path = site.tag.fqn
    parent, _, last = path.rpartition(".")
    for owner, name in ((path, "weight"), (parent, last)):
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if module._parameters.get(name) is not None:
            called = bool(site.caller) and f".{path}".endswith(f".{site.caller}")
            is_linear = name == "weight" and type(module).forward is nn.Linear.forward
            return Place(owner, name, called and is_linear)
    return None


def obstacle(model: nn.Module, site: LinearSite) -> str | None:
    """Return why a linear cannot be replaced; None if it can."""
    place = place_of(model, site)
    if place is None:
        return "no parameter of the model has its path"
    stored: Any = getattr(place.of(model), place.name)
    known = (
        site.tag.shape if not site.transposed else (*site.tag.shape[:-2], *site.tag.shape[:-3:-1])
    )
    if stored.numel() != torch.Size(known).numel() or stored.shape[-1] != known[-1]:
        return f"its weight is {list(stored.shape)}, and the graph has {list(site.tag.shape)}"
    return None


@torch.no_grad()
def packed_module(model: nn.Module, site: LinearSite, *, prepare: bool = True) -> PackedModule:
    """Return what comes in the place of a linear; `prepare` as in `PackedModule`.

    Raises:
        WeightError: the weight holds NaN or Inf; names the linear.
    """
    assert site.scheme is not None
    scheme, fqn = site.scheme, site.tag.fqn
    stored = _stored(model, site)
    oriented = _oriented(stored, site)
    smooth = scheme.calibration.smooth.get(fqn) if scheme.calibration is not None else None
    if site.is_stack:
        weights = (pack(each, scheme, fqn, expert=e) for e, each in enumerate(oriented))
        return _experts(weights, stored, site, smooth, prepare=prepare)
    bias, rest = _bias(model, site), None
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
    stored = _stored(model, site)
    *_, N, K = site.tag.shape
    smooth = torch.empty(K, device="meta", dtype=torch.float32) if smoothed else None
    if site.is_stack:
        weights = (_hollow((N, K), site) for _ in range(site.tag.shape[0]))
        return _experts(weights, stored, site, smooth, prepare=False)
    assert site.scheme is not None
    bias, rest = _bias(model, site), None
    if site.rows is not None:
        N = len(site.rows)
        others = site.tag.shape[0] - N
        rest = nn.Linear(K, others, bias is not None, device="meta", dtype=stored.dtype)
        bias = None if bias is None else bias[:N]
    facts = (site.scheme, stored.dtype, bias, smooth, site.rows, rest)
    packed = _hollow((N, K), site)
    return FP4Linear(packed, *facts, transposed=site.transposed, prepare=False)


def put(model: nn.Module, site: LinearSite, new: PackedModule) -> None:
    """Put a module in the place of a linear.

    A head that was tied to the embeddings is so no more, and transformers is told.
    """
    place = place_of(model, site)
    assert place is not None
    tied = getattr(model, "all_tied_weights_keys", {})
    if tied.pop(place.parameter, None) is not None and not tied:
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    old = place.of(model)
    if not place.is_linear:
        delattr(old, place.name)
        old.register_module(place.name, new)
        return
    for parent in model.modules():  # wherever that stands
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def packed_at(model: nn.Module, place: Place) -> PackedModule | None:
    """Return the module that stands in a place; None where it is still dense."""
    owner = place.of(model)
    found = owner if isinstance(owner, PackedModule) else owner._modules.get(place.name)
    return found if isinstance(found, PackedModule) else None


def _stored(model: nn.Module, site: LinearSite) -> Tensor:
    place = place_of(model, site)
    assert place is not None
    found: Tensor = getattr(place.of(model), place.name)
    return found.detach()


def _bias(model: nn.Module, site: LinearSite) -> Tensor | None:
    """Return the bias that the new module adds; other modules add theirs themselves."""
    place = place_of(model, site)
    assert place is not None
    found: Tensor | None = place.of(model).bias if place.is_linear else None  # type: ignore[assignment]
    return found


def _oriented(stored: Tensor, site: LinearSite) -> Tensor:
    """Return a weight as [N, K], or a stack as [E, N, K]."""
    whole = stored.view(*site.tag.shape[:-2], -1, stored.shape[-1])
    return whole.mT if site.transposed else whole


def _experts(
    weights: Iterable[PackedWeight],
    stored: Tensor,
    site: LinearSite,
    smooth: Tensor | None,
    *,
    prepare: bool,
) -> FP4Experts:
    assert site.scheme is not None
    E, N, K = site.tag.shape
    return FP4Experts(
        weights,
        (E, N, K),
        stored.shape,
        site.scheme,
        stored.dtype,
        smooth,
        transposed=site.transposed,
        prepare=prepare,
    )


def _hollow(shape: tuple[int, int], site: LinearSite) -> PackedWeight:
    assert site.scheme is not None
    format = site.scheme.format
    qdata, scale = format.shapes(*shape)
    with torch.device("meta"):
        return PackedWeight(
            torch.empty(qdata, dtype=torch.uint8),
            torch.empty(scale, dtype=format.scale_codec.dtype),
            torch.empty((), dtype=torch.float32) if format.has_per_tensor_scale else None,
            shape,
            format,
        )


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
