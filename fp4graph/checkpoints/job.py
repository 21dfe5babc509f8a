"""The linears of a checkpoint that are packed, and the files that they are written to."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from fp4graph.checkpoints import configs
from fp4graph.checkpoints.fused import FusedSet, fused_sets
from fp4graph.checkpoints.layouts import OWN
from fp4graph.checkpoints.shards import INDEX
from fp4graph.errors import ModelError, RefusalError
from fp4graph.files import write_text
from fp4graph.formats import FORMATS
from fp4graph.formats.minifloat import E4M3
from fp4graph.linears.tags import Role
from fp4graph.memory import give_back_memory, let_go
from fp4graph.packed.packing import pack
from fp4graph.passes.choose import refusal
from fp4graph.quantizers import together
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from fp4graph.checkpoints.layouts import Layout
    from fp4graph.checkpoints.names import Names
    from fp4graph.checkpoints.shards import Shards
    from fp4graph.formats import PackedWeight
    from fp4graph.graph.site import LinearSite
    from fp4graph.linears.tags import LinearTag
    from fp4graph.report import Report


class Job:
    """The linears to pack, by the tensors of the checkpoint that hold their weights."""

    def __init__(
        self,
        shards: Shards,
        layout: Layout,
        names: Names,
        sites: Sequence[LinearSite],
        report: Report,
        tags: Sequence[LinearTag],
        inputs: Mapping[str, float] | None,
    ) -> None:
        self._shards, self._layout, self._names, self._inputs = shards, layout, names, inputs
        self._report = report
        self._own = converted(shards)
        self.bytes_dense = self.bytes_packed = self.shared = 0
        found = {site.tag.fqn: site for site in sites}
        refused = [(row.path, row.reason) for row in report.refused]
        refused += [
            (path, why) for path, site in found.items() if (why := self._obstacle(site, found))
        ]
        if refused:
            raise refusal(refused, "cannot be written in this layout; select others")
        self._sites = {
            name: found[linear.path]
            for name, linear in names.linears.items()
            if linear.path in found
        }
        missing = sorted(set(found) - {site.tag.fqn for site in self._sites.values()})
        if missing:
            why = "a head that is tied to the embeddings is not there by itself"
            raise RefusalError(f"{shards.folder} has no weight of {missing[0]}: {why}")
        self._sets = self._fused(fused_sets(tags))
        self._divided = self._norms()

    def _obstacle(self, site: LinearSite, found: Mapping[str, LinearSite]) -> str | None:
        assert site.scheme is not None
        scheme, format = site.scheme, site.scheme.format
        if site.rows is not None:
            return "a part of a fused weight, and engines take the whole"
        if site.transposed and not site.is_stack:
            return "its weight is stored [in, out], which these layouts do not know"
        if scheme.rotation:
            return f"{scheme.quantizer} changes its inputs, which engines do not"
        if _smooth(site) is not None and (why := self._unfolded(site, found)):
            return f"{scheme.quantizer} divides its input, {why}"
        if site.tag.shape[-1] % format.group_size(site.tag.shape[-1]):
            return f"K={site.tag.shape[-1]} is no multiple of {format.block_size}"
        if format.base not in FORMATS:
            return f"no engine reads {format}"
        if scheme.has_int8:
            return "activations of 8 bits are fp4graph's own"
        needs = scheme.activations is Activations.SAME and format.has_per_tensor_scale
        if needs and site.tag.fqn not in (self._inputs or {}):
            return "W4A4 needs the range of its inputs, from data"
        if site.is_stack and not self._names.of(site.tag.fqn):
            return "its experts lie in one tensor, and engines take one for each"
        return None

    def _unfolded(self, site: LinearSite, found: Mapping[str, LinearSite]) -> str | None:
        """Return why a checkpoint's norm cannot be divided in place of a linear's input."""
        norm = site.norm
        if norm is None:
            return "and no norm's weight could be divided in its place"
        if not all(name in self._names.tensors for name in norm.parameters):
            return f"and the checkpoint has no {norm.parameters[0]}"
        own = _smooth(site)
        for path in norm.serves:
            other = _smooth(found[path]) if path in found else None
            if own is None or other is None or not torch.equal(own, other):
                return f"and {path} takes the same norm's result: select all of its linears"
        return None

    def _norms(self) -> dict[str, Tensor]:
        """Return what tensors of norms are divided by, [K] each."""
        found: dict[str, Tensor] = {}
        for site in self._sites.values():
            smooth = _smooth(site)
            if smooth is not None and site.norm is not None:
                found |= {self._names.tensors[name]: smooth for name in site.norm.parameters}
        return found

    def _fused(self, sets: Sequence[FusedSet]) -> dict[str, tuple[str, ...]]:
        """Return for each tensor those that it shares its per-tensor scale with, itself too."""
        found: dict[str, tuple[str, ...]] = {}
        for each in sets:
            together: dict[object, list[str]] = defaultdict(list)
            for tag in each.members:
                for name in self._names.of(tag.fqn):
                    linear = self._names.linears[name]
                    down = tag.role is Role.EXPERT and linear.is_down
                    together[linear.expert, down].append(name)
            for names in together.values():
                found |= dict.fromkeys(names, tuple(sorted(names)))
        return found

    def write(self, out: Path, progress: Callable[[int, int], None]) -> None:
        """Write all tensors, a file for each that is read."""
        files = self._shards.by_file()
        total, done = sum(path.stat().st_size for path in files), 0
        written: set[str] = set()
        index: dict[str, str] = {}
        size = 0
        for path, names in files.items():
            tensors: dict[str, Tensor] = {}
            for stored in names:
                name = self._own.get(stored, stored)
                if name in written:
                    continue
                if name in self._sites:
                    group = [each for each in self._sets.get(name, (name,)) if each in self._sites]
                    tensors |= self._packed(group)
                    written |= set(group)
                else:
                    tensors[name] = self._as_it_is(name)
            save_file(tensors, out / path.name, metadata={"format": "pt"})
            index |= dict.fromkeys(tensors, path.name)
            size += sum(each.nbytes for each in tensors.values())
            tensors.clear()
            give_back_memory()
            done += path.stat().st_size
            progress(done, total)
        if len(files) > 1:
            whole = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
            write_text(out / INDEX, json.dumps(whole, indent=2) + "\n")

    def _as_it_is(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint; a norm that is divided, in its dtype."""
        tensor = self._shards.get(name)
        divisor = self._divided.get(name)
        return tensor if divisor is None else (tensor.float() / divisor).to(tensor.dtype)

    def _packed(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the tensors of linears that share a scale, which all have one way to run."""
        if names[0] in self._own.values():
            packed = _one_scale([self._read_own(name) for name in names])
        else:
            packed = self._rounded(names)
        self.shared += len(names) > 1
        found: dict[str, Tensor] = {}
        for name, each in zip(names, packed, strict=True):
            site = self._sites[name]
            assert site.scheme is not None
            takes = site.scheme.activations is Activations.SAME
            largest = (self._inputs or {}).get(site.tag.fqn) if takes else None
            parts = self._layout.write(each, largest)
            path = name.removesuffix(".weight")
            found |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            self.bytes_dense += site.bytes_dense * each.shape[0] // _rows(site)
            self.bytes_packed += each.nbytes
        return found

    def _rounded(self, names: Sequence[str]) -> list[PackedWeight]:
        """Return the codes of dense weights, rounded together or as they were calibrated."""
        dense = {name: self._shards.get(name) for name in names}
        for name, w in dense.items():
            linear, site = self._names.linears[name], self._sites[name]
            K = site.tag.shape[-1]
            if w.ndim != 2 or w.shape[1] != K:
                raise ModelError(f"{name} is {list(w.shape)}, and {linear.path} has K={K}")
        first = self._sites[names[0]]
        assert first.scheme is not None
        if first.scheme.calibration is None:
            scheme, path = first.scheme, first.tag.fqn
            found = together(list(dense.values()), lambda rows: pack(rows, scheme, path))
        else:
            found = _one_scale([self._calibrated(name, w) for name, w in dense.items()])
        for w in dense.values():
            let_go(w)
        return found

    def _read_own(self, name: str) -> PackedWeight:
        path, parts = name.removesuffix(".weight"), OWN.parts
        there = [part for part in parts if f"{path}.{part}" in self._shards]
        return OWN.read({part: self._shards.get(f"{path}.{part}") for part in there}, path)

    def _calibrated(self, name: str, w: Tensor) -> PackedWeight:
        linear, site = self._names.linears[name], self._sites[name]
        assert site.scheme is not None
        if linear.expert is not None:
            raise RefusalError(f"{name}: calibrated experts are not written for engines")
        return pack(w, site.scheme, site.tag.fqn)

    def _is_matrix(self, name: str) -> bool:
        """Whether engines may take a tensor for a linear's: routers too, no embeddings."""
        is_weight = name.endswith(".weight") and len(self._shards.shape(name)) == 2
        return is_weight and name not in self._names.embeddings

    def chosen(self) -> configs.Chosen:
        """Return what runs how, by the checkpoint's names."""
        ways = {}
        for name, site in self._sites.items():
            assert site.scheme is not None
            ways[name.removesuffix(".weight")] = (site.scheme.format, site.scheme.activations)
        dense = [
            name.removesuffix(".weight")
            for name in self._shards.files
            if name not in self._sites and self._is_matrix(name)
        ]
        heads = {row.path for row in self._report if row.role == Role.LM_HEAD} - set(ways)
        return configs.Chosen(ways, sorted({*dense, *heads}))


def _smooth(site: LinearSite) -> Tensor | None:
    """Return what a linear's input is divided by, for the codes that it was calibrated with."""
    if site.scheme is None or site.scheme.calibration is None:
        return None
    return site.scheme.calibration.smooth.get(site.tag.fqn)


def _rows(site: LinearSite) -> int:
    """Return the rows of all matrices of a linear or of a stack."""
    return math.prod(site.tag.shape[:-1])


def converted(shards: Shards) -> dict[str, str]:
    """Return what a converted folder's packed tensors are called in the dense one.

    Raises:
        RefusalError: experts are in it, in one tensor.
    """
    found = {}
    for name in shards.files:
        path, _, last = name.rpartition(".")
        if f"{path}.qdata" in shards and last in OWN.parts:
            if len(shards.shape(f"{path}.qdata")) != 2:
                raise RefusalError(
                    f"{path}: experts lie in one tensor, and engines take one for each"
                )
            found[name] = f"{path}.weight"
    return found


def _one_scale(packed: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Return weights under one per-tensor scale, the largest; codes stay as they are.

    The scales of blocks are rounded under the new one: codes that were found with data would lose
    what they make up for if they were rounded anew.
    """
    tops = [each.per_tensor_scale for each in packed]
    first = tops[0]
    if first is None or all(top is not None and torch.equal(top, first) for top in tops):
        return list(packed)
    known = [top for top in tops if top is not None]
    shared = torch.stack(known).amax()
    found = []
    for each in packed:
        factor = each.format.scale_codec.decode(each.scale_codes, each.per_tensor_scale)
        scale = E4M3.encode((factor / shared).clamp(min=E4M3.smallest)).view(each.scale.dtype)
        found.append(replace(each, scale=scale, per_tensor_scale=shared))
    return found
