"""Codes for one block: transforms, scales, GPTQ, and training for those that ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp4graph.errors import CalibrationError, WeightError
from fp4graph.quantizers import (
    GRIDS,
    Calibration,
    Quantizer,
    Transform,
    distill,
    gptq,
    learn,
    output_error,
    smoothing,
    together,
)

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence

    from torch import Tensor

    from fp4graph.calibration.blocks import Blocks
    from fp4graph.formats import BlockFormat, PackedWeight
    from fp4graph.graph.site import LinearSite
    from fp4graph.quantizers.distilled import Factors


@dataclass(frozen=True)
class _Linear:
    """A linear as it is rounded: transformed, with the mean of x x^T of its transformed input.

    And the output error when it is rounded to nearest as it is, all its names, which input it
    takes, the norm that this comes from if that may change, and whether it has seen any token.
    """

    names: tuple[str, ...]
    input: int
    norm: int | None
    seen: bool
    format: BlockFormat
    how: Quantizer
    transform: Transform
    weight: Tensor
    mean: Tensor
    plain_error: float

    def to_nearest(self, weight: Tensor) -> PackedWeight:
        """Round a weight under the scales that are best for its input."""
        return GRIDS[self.how.grid](weight, self.format, self.mean.diagonal())


def find_codes(blocks: Blocks, number: int, damping: float, *, one_scale: bool) -> Calibration:
    """Return codes for a block's linears, and output errors: to nearest, and with these codes.

    Args:
        blocks: the model.
        number: of the block.
        damping: see `gptq`.
        one_scale: whether linears of one input that run in one way share a per-tensor scale.
    """
    linears = dict(_linears(blocks, number))
    found = _to_nearest(linears, one_scale=one_scale)
    for fqn, linear in linears.items():
        if linear.how.solver != "rtn":
            base = found[fqn]
            found[fqn] = gptq(linear.weight, linear.mean, base, damping=damping, name=fqn)
    transforms = _train(blocks, number, linears, found)
    quantizers: dict[str, Quantizer] = {}
    packed: dict[str, PackedWeight] = {}
    smooth: dict[str, Tensor] = {}
    about: dict[str, Any] = {"output_error": {}, "unseen": []}
    for fqn, linear in linears.items():
        as_found = output_error(linear.weight, found[fqn].dequantize(), linear.mean)
        for name in linear.names:
            quantizers[name] = linear.how
            packed[name] = found[fqn]
            about["output_error"][name] = linear.plain_error, as_found
            if (factor := transforms[fqn].smooth) is not None:
                smooth[name] = factor
            if not linear.seen:
                about["unseen"].append(name)
    return Calibration(quantizers, packed, smooth, {}, about)


def _to_nearest(linears: Mapping[str, _Linear], *, one_scale: bool) -> dict[str, PackedWeight]:
    """Return all weights under their scales, rounded to nearest."""
    groups: dict[object, list[str]] = {}
    for fqn, linear in linears.items():
        key = (linear.input, linear.format, linear.how) if one_scale else fqn
        groups.setdefault(key, []).append(fqn)
    found: dict[str, PackedWeight] = {}
    for names in groups.values():
        rounded = together([linears[fqn].weight for fqn in names], linears[names[0]].to_nearest)
        found |= zip(names, rounded, strict=True)
    return {fqn: found[fqn] for fqn in linears}


def _train(
    blocks: Blocks,
    number: int,
    linears: Mapping[str, _Linear],
    found: dict[str, PackedWeight],
) -> dict[str, Transform]:
    """Train the codes of those linears of a block whose quantizers do so, in place.

    Returns:
        the transforms of all, with the norms that were trained.
    """
    solvers = {fqn: linear.how.solver for fqn, linear in linears.items()}
    learned = [fqn for fqn, solver in solvers.items() if solver == "learned"]
    distilled = [fqn for fqn, solver in solvers.items() if solver == "distilled"]
    if not learned and not distilled:
        return {fqn: linear.transform for fqn, linear in linears.items()}
    of_block = blocks.error(number)

    def transforms(factors: Factors) -> dict[str, Transform]:
        return {
            fqn: linear.transform.divided(factors.get(linear.norm))
            for fqn, linear in linears.items()
        }

    def error(weights: Mapping[str, Tensor], factors: Factors, batch: int) -> Tensor:
        current = transforms(factors)
        undone = {
            fqn: current[fqn].undo(weights[fqn] if fqn in weights else found[fqn].dequantize())
            for fqn in linears
        }
        by_name = {name: each for fqn, each in current.items() for name in linears[fqn].names}
        return of_block(undone, by_name, batch)

    def weights(those: Sequence[str]) -> dict[str, Tensor]:
        return {fqn: linears[fqn].weight for fqn in those}

    if learned:
        start = {fqn: found[fqn] for fqn in learned}
        found |= learn(
            weights(learned), start, lambda w, batch: error(w, {}, batch), blocks.batches
        )
    if not distilled:
        return transforms({})
    norms: dict[Hashable, int] = {
        linears[fqn].norm: linears[fqn].weight.shape[1]
        for fqn in distilled
        if linears[fqn].norm is not None
    }
    start = {fqn: found[fqn] for fqn in distilled}
    best = distill(weights(distilled), start, norms, error, blocks.batches)
    found |= best.packed
    return transforms(best.factors)


def _linears(blocks: Blocks, number: int) -> Iterator[tuple[str, _Linear]]:
    seen = blocks.see(number)
    shared: dict[object, tuple[Transform, Tensor]] = {}  # by the input and how it is transformed
    for each in seen:
        site, hessian, fqn = each.site, each.hessian, each.names[0]
        hessian.check(fqn)
        format, how = _way(site)
        plain_NK = blocks.weight(site, each.expert)
        if how.rotation and site.tag.shape[-1] % how.rotation:
            problem = f"K={site.tag.shape[-1]} is no multiple of the rotation's {how.rotation}"
            raise CalibrationError(f"{fqn}: {problem}")
        if (how.rotation or how.strength) and site.rows is not None:
            problem = f"it is fused: select all of {','.join(site.tag.parts)}"
            raise CalibrationError(f"{fqn}: {problem}, for its quantizer changes all its input")
        key = id(hessian), how.rotation, how.strength
        if key not in shared:
            smooth = None
            if how.strength and each.from_norm:
                alike = (one for one in seen if one.hessian is hessian)
                alike = (one for one in alike if _way(one.site)[1].strength == how.strength)
                together = [blocks.weight(one.site) for one in alike]
                smooth = smoothing(hessian.amax, together, how.strength)
            transform = Transform(how.rotation, smooth)
            mean_KK = hessian.mean.to(plain_NK.device)  # an expert may have seen no token
            shared[key] = transform, transform.of_hessian(mean_KK)
        transform, mean_KK = shared[key]
        try:
            nearest = transform.apply(format.quantize(plain_NK).dequantize())
        except WeightError as error:
            raise WeightError(f"{fqn}: {error}") from None
        weight = transform.apply(plain_NK)
        plain_error = output_error(weight, nearest, mean_KK)
        trains_norm = how.solver == "distilled" and each.from_norm and site.rows is None
        norm = id(hessian) if trains_norm else None
        facts = each.names, id(hessian), norm, hessian.tokens > 0, format, how
        yield fqn, _Linear(*facts, transform, weight, mean_KK, plain_error)


def _way(site: LinearSite) -> tuple[BlockFormat, Quantizer]:
    assert site.scheme is not None  # it is selected
    return site.scheme.format, site.scheme.quantizer
