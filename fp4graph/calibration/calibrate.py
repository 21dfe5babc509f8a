"""Calibration: codes for a model's linears that are found with data, block by block."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4graph.calibration.blocks import Blocks
from fp4graph.errors import CalibrationError, OptionError, WeightError
from fp4graph.policy import Policy
from fp4graph.quantizers import (
    DAMPING,
    GRIDS,
    NEED_DATA,
    Calibration,
    Quantizer,
    Transform,
    gptq,
    learn,
    output_error,
    smoothing,
)
from fp4graph.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from fp4graph.formats import BlockFormat, PackedWeight
    from fp4graph.graph.site import LinearSite
    from fp4graph.policy import Select


_LOG = logging.getLogger("fp4graph.calibrate")
_UNSEEN = "no token came to %d experts, so their codes come of no data: %s, ..."


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    select: Select = "all",
    *,
    format: str | BlockFormat = "nvfp4",
    quantizer: str = "gptq",
    damping: float = DAMPING,
    propagate: bool = True,
    out: Path | str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Find codes for the selected linears with data (2509.23202 section 4).

    Args:
        model: the model; its weights stay as they are.
        batches: inputs of the model, all of one shape: token ids, int64 [batch, sequence], or
            keyword arguments.
        select: which linears; a mapping as in `backend` calibrates each in its own way, and of
            those quantizers that need no data it keeps the codes too.
        format: NVFP4 or MXFP4.
        quantizer: `weighted-scale-search` takes the best scales by what each column's error does to
            the output. `gptq` is GPTQ, `gptq:scale-search` the same on better scales. `@32` behind
            either rotates weight and input. `mr-gptq` is what 2509.23202 prescribes for the format.
            `learned` begins where `gptq` ends and goes by the gradient of each block's output
            error. `+smooth` or `+smooth0.5` behind a quantizer that does not rotate is SmoothQuant
            with alpha 0.6 or as said: inputs that come from a norm are divided in the norm.
        damping: see `fp4graph.quantizers.gptq`.
        propagate: whether a block sees what the rounded blocks before it give, as it will when the
            model runs, or what the dense ones give.
        out: a file for the result. Blocks that are done are kept beside it until it is written, and
            a call goes on after them: one with the same arguments, for the same graph, weights,
            batches and versions.
        about: facts to keep in the file.
        progress: called with how many blocks of how many are done.

    Returns:
        the codes, for `backend(calibration=...)`; `about["output_error"]` has for each linear the
        squared error of its output over the square on the batches, rounded to nearest and as found.
        A weight that is used more than once a call is rounded for the inputs of all its uses.
        `about["unseen"]` names the experts that no token came to: their codes are what comes of no
        data, and a warning says so.

    Raises:
        OptionError: no such quantizer, or one that the format has no use for.
        SelectorError: a term matches nothing.
        CalibrationError: the model cannot be run block by block; no batches, or of several shapes;
            a linear that cannot be calibrated, or whose inputs were NaN or Inf.
        WeightError: a weight holds NaN or Inf.
    """
    policy = policy_for(select, format, quantizer)
    learns = any(scheme.quantizer.solver == "learned" for scheme in policy.schemes)
    blocks = Blocks(model, batches, policy, dense=learns)
    facts = {**(about or {}), "select": policy.text, "propagate": propagate, "damping": damping}
    versions = {name: version(name) for name in ("fp4graph", "torch", "transformers")}
    key = hashlib.sha256(f"{policy} {facts} {versions} {blocks.digest()}".encode()).hexdigest()
    kept = None if out is None else Path(f"{out}.blocks") / key[:16]  # whoever else writes to out
    ended: list[Calibration | Path] = []  # what has a file is left there meanwhile
    for number in range(len(blocks)):
        progress(number, len(blocks))
        file = None if kept is None else kept / f"{number}.safetensors"
        done = _load(file, key)
        if done is None:
            done = _block(blocks, number, damping)
            done.about["key"] = key
            if file is not None:
                try:
                    done.save(file)
                except CalibrationError:
                    if _load(Path(str(out)), key) is None:
                        raise  # else another process has ended, and removed the folder
        ended.append(file or done)
        rounded = {fqn: done.dequantize(fqn) for fqn in done.packed if propagate}
        blocks.advance(number, rounded)
    progress(len(blocks), len(blocks))
    result = _together(ended, out, key)
    facts["output_error"] = result.about["output_error"]
    facts["unseen"] = result.about["unseen"]
    if facts["unseen"]:
        _LOG.warning(_UNSEEN, len(facts["unseen"]), ", ".join(facts["unseen"][:3]))
    result = replace(result, fingerprints=blocks.fingerprints(), about={**facts, "key": key})
    if out is not None and kept is not None:
        result.save(out)
        shutil.rmtree(kept, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run's blocks are there
            kept.parent.rmdir()
    return result


def policy_for(select: Select, format: str | BlockFormat, quantizer: str) -> Policy:
    """Return what is to be calibrated how; arguments as in `calibrate`.

    Raises:
        OptionError: no such format or quantizer, or none that needs data.
        SelectorError: a selector that cannot be parsed.
    """
    default = Scheme.read(format, quantizer, None, "auto")
    policy = Policy.read(select, default)
    if not any(scheme.quantizer.needs_data for scheme in policy.schemes):
        problem = f"needs no data: expected {', '.join(NEED_DATA)}"
        raise OptionError(f"quantizer {quantizer!r} {problem}")
    return policy


def _together(ended: Sequence[Calibration | Path], out: Path | str | None, key: str) -> Calibration:
    """Return the codes of all blocks.

    Another process that does the same may have put them together already, and removed them.
    """
    blocks: list[Calibration] = []
    for each in ended:
        done = _load(each, key) if isinstance(each, Path) else each
        if done is None:
            whole = None if out is None else _load(Path(out), key)
            if whole is None:
                raise CalibrationError(f"{each} was removed while it was needed: start again")
            return whole
        blocks.append(done)
    about: dict[str, Any] = {"output_error": {}, "unseen": []}
    packed: dict[str, PackedWeight] = {}
    smooth: dict[str, Tensor] = {}
    quantizers: dict[str, Quantizer] = {}
    for block in blocks:
        quantizers.update(block.quantizers)
        packed.update(block.packed)
        smooth.update(block.smooth)
        about["output_error"].update(block.about["output_error"])
        about["unseen"] += block.about["unseen"]
    return Calibration(quantizers, packed, smooth, {}, about)


@dataclass(frozen=True)
class _Linear:
    """A linear as it is rounded: transformed, with the mean of x x^T of its transformed input.

    And the output error when it is rounded to nearest as it is, all its names, and whether it has
    seen any token.
    """

    names: tuple[str, ...]
    seen: bool
    format: BlockFormat
    how: Quantizer
    transform: Transform
    weight: Tensor
    mean: Tensor
    to_nearest: float


def _block(blocks: Blocks, number: int, damping: float) -> Calibration:
    """Return codes for a block's linears, and output errors: to nearest, and with these codes."""
    linears = dict(_linears(blocks, number))
    found: dict[str, PackedWeight] = {}
    for fqn, linear in linears.items():
        base = GRIDS[linear.how.grid](linear.weight, linear.format, linear.mean.diagonal())
        found[fqn] = base
        if linear.how.solver != "rtn":
            found[fqn] = gptq(linear.weight, linear.mean, base, damping=damping, name=fqn)
    learned = [fqn for fqn, linear in linears.items() if linear.how.solver == "learned"]
    if learned:
        error = blocks.error(number)
        others = {fqn: found[fqn].dequantize() for fqn in linears if fqn not in learned}

        def of_transformed(weights: Mapping[str, Tensor], batch: int) -> Tensor:
            all_weights = {**others, **weights}
            undone = {fqn: linears[fqn].transform.undo(each) for fqn, each in all_weights.items()}
            return error(undone, batch)

        weights = {fqn: linears[fqn].weight for fqn in learned}
        start = {fqn: found[fqn] for fqn in learned}
        found |= learn(weights, start, of_transformed, blocks.batches)
    quantizers: dict[str, Quantizer] = {}
    packed: dict[str, PackedWeight] = {}
    smooth: dict[str, Tensor] = {}
    about: dict[str, Any] = {"output_error": {}, "unseen": []}
    for fqn, linear in linears.items():
        as_found = output_error(linear.weight, found[fqn].dequantize(), linear.mean)
        for name in linear.names:
            quantizers[name] = linear.how
            packed[name] = found[fqn]
            about["output_error"][name] = linear.to_nearest, as_found
            if linear.transform.smooth is not None:
                smooth[name] = linear.transform.smooth
            if not linear.seen:
                about["unseen"].append(name)
    return Calibration(quantizers, packed, smooth, {}, about)


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
        to_nearest = output_error(weight, nearest, mean_KK)
        facts = each.names, hessian.tokens > 0, format, how
        yield fqn, _Linear(*facts, transform, weight, mean_KK, to_nearest)


def _way(site: LinearSite) -> tuple[BlockFormat, Quantizer]:
    assert site.scheme is not None  # it is selected
    return site.scheme.format, site.scheme.quantizer


def _load(file: Path | None, key: str) -> Calibration | None:
    """Return a block that an earlier call with the same arguments has done."""
    if file is None or not file.is_file():
        return None
    try:
        done = Calibration.load(file)
    except CalibrationError:
        if file.is_file():
            raise
        return None  # another process has just removed it
    return done if done.about.get("key") == key else None
