"""Calibration: codes for a model's linears that are found with data, block by block."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4graph.blocks import Blocks
from fp4graph.calibrate import (
    DAMPING,
    GRIDS,
    NEED_DATA,
    Calibration,
    Quantizer,
    gptq,
    learn,
    output_error,
)
from fp4graph.errors import OptionError, WeightError
from fp4graph.formats import get_format
from fp4graph.policy import Policy, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from fp4graph.formats import BlockFormat, PackedWeight
    from fp4graph.selector import Selector


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    select: str | Selector = "all",
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
        select: which linears.
        format: NVFP4 or MXFP4.
        quantizer: `weighted-scale-search`, the best scales by what each column's error does to the
            output; `gptq`; on better scales `gptq:scale-search` and the like; with weight and input
            rotated `gptq@32`, `gptq:scale-search@16`; `mr-gptq`, what 2509.23202 prescribes for
            the format; `learned`, `learned:scale-search` and the like, which begin where gptq ends
            and go by the gradient of each block's output error.
        damping: see `fp4graph.calibrate.gptq`.
        propagate: whether a block sees what the rounded blocks before it give, as it will when the
            model runs, or what the dense ones give.
        out: a file for the result. Blocks that are done are kept beside it until it is written, and
            a call with the same arguments goes on after them.
        about: facts to keep in the file.
        progress: called with how many blocks of how many are done.

    Returns:
        the codes, for `backend(calibration=...)`; `about["output_error"]` has for each linear the
        squared error of its output over the square on the batches, rounded to nearest and as found.

    Raises:
        OptionError: no such quantizer, or one that the format has no use for.
        SelectorError: a term matches nothing.
        CalibrationError: the model cannot be run block by block; no batches, or of several shapes;
            a linear that cannot be calibrated.
        WeightError: a weight holds NaN or Inf.
    """
    block_format = get_format(format)
    how = Quantizer.parse(quantizer, block_format)
    if not how.needs_data:
        raise OptionError(f"quantizer {quantizer!r} needs no data: expected {', '.join(NEED_DATA)}")
    policy = Policy.of(select, Scheme.of(block_format))
    blocks = Blocks(model, batches, policy, how.rotation, dense=how.solver == "learned")
    facts = {**(about or {}), "select": str(select), "propagate": propagate, "damping": damping}
    key = hashlib.sha256(
        f"{block_format} {quantizer} {facts} {blocks.digest()}".encode()
    ).hexdigest()
    kept = None if out is None else Path(f"{out}.blocks")
    packed: dict[str, PackedWeight] = {}
    errors: dict[str, tuple[float, float]] = {}
    for number in range(len(blocks)):
        progress(number, len(blocks))
        file = None if kept is None else kept / f"{number}.safetensors"
        done = _load(file, key)
        if done is None:
            found, erred = _block(blocks, number, block_format, how, damping)
            done = Calibration(
                str(block_format), quantizer, found, {}, {"key": key, "output_error": erred}
            )
            if file is not None:
                done.save(file)
        packed.update(done.packed)
        errors.update(done.about["output_error"])
        blocks.advance(number, done.packed if propagate else {})
    progress(len(blocks), len(blocks))
    facts["output_error"] = errors
    result = Calibration(str(block_format), quantizer, packed, blocks.fingerprints(), facts)
    if out is not None:
        result.save(out)
        shutil.rmtree(f"{out}.blocks", ignore_errors=True)
    return result


def _block(
    blocks: Blocks, number: int, format: BlockFormat, how: Quantizer, damping: float
) -> tuple[dict[str, PackedWeight], dict[str, tuple[float, float]]]:
    """Return codes for a block's linears, and output errors: to nearest, and with these codes."""
    weights: dict[str, Tensor] = {}
    means: dict[str, Tensor] = {}
    nearest: dict[str, Tensor] = {}
    found: dict[str, PackedWeight] = {}
    for site, hessian in blocks.see(number):
        fqn, plain_NK = site.tag.fqn, blocks.weight(site)
        weights[fqn], means[fqn] = blocks.turned(plain_NK), hessian.mean
        try:
            nearest[fqn] = blocks.turned(format.quantize(plain_NK).dequantize())
            base = GRIDS[how.grid](weights[fqn], format, means[fqn].diagonal())
        except WeightError as error:
            raise WeightError(f"{fqn}: {error}") from None
        found[fqn] = base
        if how.solver != "rtn":
            found[fqn] = gptq(weights[fqn], means[fqn], base, damping=damping, name=fqn)
    if how.solver == "learned":
        found = learn(weights, found, blocks.error(number), blocks.batches)
    errors = {
        fqn: (
            output_error(weights[fqn], nearest[fqn], means[fqn]),
            output_error(weights[fqn], found[fqn].dequantize(), means[fqn]),
        )
        for fqn in found
    }
    return found, errors


def _load(file: Path | None, key: str) -> Calibration | None:
    """Return a block that an earlier call with the same arguments has done."""
    if file is None or not file.is_file():
        return None
    done = Calibration.load(file)
    return done if done.about["key"] == key else None
