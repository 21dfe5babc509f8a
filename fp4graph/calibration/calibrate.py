"""Calibration: codes for a model's linears that are found with data, block by block."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp4graph.calibration.blocks import Blocks
from fp4graph.calibration.codes import find_codes
from fp4graph.errors import CalibrationError, OptionError
from fp4graph.policy import Policy
from fp4graph.quantizers import (
    DAMPING,
    NEED_DATA,
    Calibration,
    Quantizer,
)
from fp4graph.scheme import ENGINES, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor, nn

    from fp4graph.formats import BlockFormat, PackedWeight
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
    activations: str | None = None,
    serve: str | None = None,
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
            error. `distilled` does so with each window once, trains the weights of norms too, and
            keeps what is best on windows that were held out; its scales are the weighted ones
            unless others are named. `+smooth` or `+smooth0.5` behind a quantizer that does not
            rotate is SmoothQuant with alpha 0.6 or as said: inputs that come from a norm are
            divided in the norm.
        activations: `same` rounds inputs too while codes are found (W4A4): between blocks, and
            where `learned` and `distilled` train. `int8` has no part in finding codes.
        serve: `vllm` or `sglang`: linears of one input that run in one way share a per-tensor scale
            from the start, as such engines want it of those that they compute as one. `export`
            leaves their codes and scales then as they are.
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
        OptionError: no such quantizer or engine, or a quantizer that the format has no use for.
        SelectorError: a term matches nothing.
        CalibrationError: the model cannot be run block by block; no batches, or of several shapes;
            a linear that cannot be calibrated, or whose inputs were NaN or Inf.
        WeightError: a weight holds NaN or Inf.
        StudyError: values between blocks have room neither in memory nor on the disk.
    """
    policy = policy_for(select, format, quantizer, activations)
    learns = any(scheme.quantizer.trains for scheme in policy.schemes)
    blocks = Blocks(model, batches, policy, dense=learns)
    if serve not in (None, *ENGINES):
        raise OptionError(f"serve={serve!r}: expected {', '.join(ENGINES)}")
    facts = {**(about or {}), "select": policy.text, "propagate": propagate, "damping": damping}
    facts |= {} if serve is None else {"serve": serve}
    versions = {name: version(name) for name in ("fp4graph", "torch", "transformers")}
    key = hashlib.sha256(f"{policy} {facts} {versions} {blocks.digest()}".encode()).hexdigest()
    kept = None if out is None else Path(f"{out}.blocks") / key[:16]  # whoever else writes to out
    ended: list[Calibration | Path] = []  # what has a file is left there meanwhile
    for number in range(len(blocks)):
        progress(number, len(blocks))
        file = None if kept is None else kept / f"{number}.safetensors"
        done = _load(file, key)
        if done is None:
            done = find_codes(blocks, number, damping, one_scale=serve is not None)
            done.about["key"] = key
            if file is not None:
                try:
                    done.save(file)
                except CalibrationError:
                    if _load(Path(str(out)), key) is None:
                        raise  # else another process has ended, and removed the folder
        ended.append(file or done)
        rounded = {fqn: done.dequantize(fqn) for fqn in done.packed if propagate}
        blocks.advance(number, rounded, {fqn: done.transform(fqn) for fqn in rounded})
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


def policy_for(
    select: Select, format: str | BlockFormat, quantizer: str, activations: str | None = None
) -> Policy:
    """Return what is to be calibrated how; arguments as in `calibrate`.

    Raises:
        OptionError: no such format, quantizer or mode, or no quantizer that needs data.
        SelectorError: a selector that cannot be parsed.
    """
    default = Scheme.read(format, quantizer, activations, "auto")
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
