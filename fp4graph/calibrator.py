"""Calibration block by block: what comes in is seen, weights are rounded, what goes out goes on.

At any moment there are one block's Hessians and the values between two blocks, so that a model
needs little more memory than it takes anyway.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4graph.calibrate import (
    DAMPING,
    GRIDS,
    NEED_DATA,
    Calibration,
    Hessian,
    Quantizer,
    gptq,
    rotate,
)
from fp4graph.errors import CalibrationError, OptionError, WeightError
from fp4graph.fingerprint import fingerprint
from fp4graph.formats import get_format
from fp4graph.passes.base import run_passes
from fp4graph.passes.cuts import Cut, cuts, segment
from fp4graph.passes.match import match_linear
from fp4graph.passes.regions import copy_graph
from fp4graph.passes.select import SelectLinears
from fp4graph.passes.site import LinearSite, site_of
from fp4graph.policy import Policy, Scheme
from fp4graph.trace import TracedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch.fx import Node

    from fp4graph.formats import BlockFormat, PackedWeight
    from fp4graph.selector import Selector

    Args = tuple[Any, ...]


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
            the format.
        damping: see `fp4graph.calibrate.gptq`.
        propagate: whether a block sees what the rounded blocks before it give, as it will when the
            model runs, or what the dense ones give.
        out: a file for the result. Blocks that are done are kept beside it until it is written, and
            a call with the same arguments goes on after them.
        about: facts to keep in the file.
        progress: called with how many blocks of how many are done.

    Returns:
        the codes, for `backend(calibration=...)`.

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
    blocks = _Blocks(model, batches, policy, how.rotation)
    facts = {**(about or {}), "select": str(select), "propagate": propagate, "damping": damping}
    key = hashlib.sha256(
        f"{block_format} {quantizer} {facts} {blocks.digest()}".encode()
    ).hexdigest()
    kept = None if out is None else Path(f"{out}.blocks")
    packed: dict[str, PackedWeight] = {}
    for number in range(len(blocks)):
        progress(number, len(blocks))
        file = None if kept is None else kept / f"{number}.safetensors"
        found = _load(file, key)
        if found is None:
            found = {
                site.tag.fqn: _round(
                    site.tag.fqn,
                    blocks.turned(blocks.weight(site)),
                    block_format,
                    how,
                    hessian.mean,
                    damping,
                )
                for site, hessian in blocks.see(number)
            }
            if file is not None:
                Calibration(str(block_format), quantizer, found, {}, {"key": key}).save(file)
        packed.update(found)
        blocks.advance(number, found if propagate else {})
    progress(len(blocks), len(blocks))
    result = Calibration(str(block_format), quantizer, packed, blocks.fingerprints(), facts)
    if out is not None:
        result.save(out)
        shutil.rmtree(f"{out}.blocks", ignore_errors=True)
    return result


def _round(
    fqn: str,
    w_NK: Tensor,
    format: BlockFormat,
    how: Quantizer,
    mean_KK: Tensor,
    damping: float,
) -> PackedWeight:
    try:
        base = GRIDS[how.grid](w_NK, format, mean_KK.diagonal())
    except WeightError as error:
        raise WeightError(f"{fqn}: {error}") from None
    return gptq(w_NK, mean_KK, base, damping=damping, name=fqn) if how.solver == "gptq" else base


def _load(file: Path | None, key: str) -> dict[str, PackedWeight] | None:
    """Return a block that an earlier call with the same arguments has done."""
    if file is None or not file.is_file():
        return None
    done = Calibration.load(file)
    return done.packed if done.about["key"] == key else None


class _Blocks:
    """A model in blocks, and for each batch the values that come into the next one."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor | Mapping[str, Any]],
        policy: Policy,
        rotation: int,
    ) -> None:
        self._rotation = rotation
        traced = TracedModel(model)
        self._args = _record(traced, batches)
        if len(traced.graphs) != 1:
            raise CalibrationError(
                f"Dynamo made {len(traced.graphs)} graphs of the model, and calibration needs one: "
                "give batches of one shape, and a model without graph breaks"
            )
        self._gm = copy_graph(traced.graphs[0].tagged)
        run_passes(self._gm, self._args[0], (SelectLinears(policy, traced.tags),))
        found = cuts(self._gm)
        if isinstance(found, str):
            raise CalibrationError(f"the model cannot be run block by block: {found}")
        self._starts = found
        nodes = list(self._gm.graph.nodes)
        self._linears: list[dict[Node, LinearSite]] = [{} for _ in found]
        for index, node in enumerate(nodes):
            site = site_of(node)
            if site is not None and site.scheme is not None:
                _check(site, rotation)
                number = max(i for i, cut in enumerate(found) if cut.index <= index)
                self._linears[number][node] = site
        first = segment(self._gm, Cut(0, ()), found[0])
        self._live = [first(*args) for args in self._args]

    def __len__(self) -> int:
        return len(self._starts)

    @torch.no_grad()
    def see(self, number: int) -> list[tuple[LinearSite, Hessian]]:
        """Return a block's selected linears, each with the Hessian of its input."""
        inputs: dict[tuple[Node, int], Hessian] = {}
        linears = []
        for node, site in self._linears[number].items():
            form = match_linear(node)
            assert form is not None
            source = (form.x, form.x_dim)
            if source not in inputs:
                inputs[source] = Hessian(site.tag.shape[1])
            linears.append((site, inputs[source]))
        sources = [x for x, _ in inputs]
        seen = segment(self._gm, self._starts[number], self._end(number), sources)
        for args, live in zip(self._args, self._live, strict=True):
            for ((_, dim), hessian), x in zip(inputs.items(), seen(*args, *live), strict=True):
                hessian.add(self.turned(x.movedim(dim, -1)))
        return linears

    @torch.no_grad()
    def advance(self, number: int, packed: Mapping[str, PackedWeight]) -> None:
        """Run a block with rounded weights, up to the next."""
        end = self._end(number)
        if end is None:
            return
        rounded = {}
        for site in self._linears[number].values():
            if site.tag.fqn in packed:
                assert site.weight is not None
                w_NK = self.turned(packed[site.tag.fqn].dequantize())  # and so turned back
                w_NK = w_NK.to(self._args[0][site.weight].dtype)
                rounded[site.weight] = w_NK.T if site.transposed else w_NK
        run = segment(self._gm, self._starts[number], end)
        for batch, (args, live) in enumerate(zip(self._args, self._live, strict=True)):
            changed = (rounded.get(index, each) for index, each in enumerate(args))
            self._live[batch] = run(*changed, *live)

    def turned(self, x: Tensor) -> Tensor:
        """Rotate the last dimension, if that is to be."""
        return rotate(x.to(torch.float32), self._rotation) if self._rotation else x

    def weight(self, site: LinearSite) -> Tensor:
        """Return a linear's dense weight, [N, K]."""
        assert site.weight is not None
        weight: Tensor = self._args[0][site.weight].detach()
        return weight.T if site.transposed else weight

    def fingerprints(self) -> dict[str, int]:
        """Return a hash of each selected linear's weight."""
        linears = (site for block in self._linears for site in block.values())
        return {site.tag.fqn: fingerprint(self.weight(site).contiguous()) for site in linears}

    def digest(self) -> str:
        """Return a hash of the weights and of the batches."""
        tensors = (each for args in self._args for each in args if isinstance(each, Tensor))
        hashes = {id(each): fingerprint(each) for each in tensors if each.numel()}
        return repr(list(hashes.values()))

    def _end(self, number: int) -> Cut | None:
        return self._starts[number + 1] if number + 1 < len(self._starts) else None


class _Recorded(Exception):
    """Ends a call of the model early: what its graph is given is known."""


@torch.no_grad()
def _record(traced: TracedModel, batches: Iterable[Tensor | Mapping[str, Any]]) -> list[Args]:
    """Return the inputs of the model's graph for each batch; but for the first it is not run."""
    found: list[Args] = []

    def record(*args: Any) -> Any:
        found.append(args)
        raise _Recorded

    for batch in batches:
        inputs = {"input_ids": batch, "use_cache": False} if isinstance(batch, Tensor) else batch
        if not traced.graphs:
            traced(**inputs)
        traced.graphs[0].run = record
        try:
            traced(**inputs)
        except _Recorded:
            continue
        break  # another graph ran, which the caller notices
    if not found:
        raise CalibrationError("there are no batches to calibrate with")
    return found


def _check(site: LinearSite, rotation: int) -> None:
    """Check that a linear can be calibrated.

    Raises:
        CalibrationError: it cannot.
    """
    reason = site.unsupported
    if len(site.tag.shape) != 2:
        reason = "experts are not calibrated yet"
    elif site.rows is not None:
        reason = f"it is fused: select all of {','.join(site.tag.parts)}"
    elif rotation and site.tag.shape[1] % rotation:
        reason = f"K={site.tag.shape[1]} is no multiple of the rotation's {rotation}"
    if reason is not None:
        raise CalibrationError(f"{site.tag.fqn}: {reason}")
