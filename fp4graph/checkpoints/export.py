"""Dense checkpoints written packed for other engines, file by file."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fp4graph.checkpoints import configs
from fp4graph.checkpoints.fused import FusedSet, closed, fused_sets
from fp4graph.checkpoints.layouts import LAYOUTS, MODELOPT, OWN, Layout
from fp4graph.checkpoints.names import Names
from fp4graph.checkpoints.shards import INDEX, Shards, read_json
from fp4graph.conversion import plan
from fp4graph.errors import ModelError, OptionError, RefusalError, SelectorError
from fp4graph.files import write_text
from fp4graph.linears.tags import Role
from fp4graph.memory import give_back_memory, let_go
from fp4graph.packed.packing import pack
from fp4graph.passes.choose import refusal
from fp4graph.scheme import Activations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from fp4graph.checkpoints.fused import Round
    from fp4graph.formats import PackedWeight
    from fp4graph.graph.site import LinearSite
    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy
    from fp4graph.report import Report


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        policy: what runs how, rounded to whole fused sets.
        changed: linears that the rounding took in or left out.
        report: a row for each linear.
        bytes_dense: of the quantised linears before.
        bytes_packed: of the same as written.
        shared: sets whose linears got one per-tensor scale.
    """

    policy: Policy
    changed: tuple[LinearTag, ...]
    report: Report
    bytes_dense: int
    bytes_packed: int
    shared: int


def export(
    folder: Path,
    model: nn.Module,
    policy: Policy,
    to: str,
    out: Path,
    *,
    round: Round | None = None,
    inputs: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    card: Callable[[Policy], str] = lambda policy: "",
) -> Exported:
    """Write a checkpoint whose selected linears are packed, whole or not at all.

    A file is read, packed and written before the next; of a fused set that lies in several files,
    the linears are written together.

    Args:
        folder: the dense checkpoint.
        model: the same without its weights, on the meta device.
        policy: what runs how.
        to: `compressed-tensors` or `modelopt`.
        out: a new folder.
        round: see `fused.closed`.
        inputs: largest magnitude of each linear's inputs, by path; W4A4 of NVFP4 needs it.
        progress: is told how many bytes of how many are read.
        card: gives the text of README.md, of what runs how.

    Raises:
        ModelError: the checkpoint cannot be read; `out` is there or cannot be written.
        OptionError: no such layout.
        SelectorError: a selector matches nothing, or leaves no linear.
        RefusalError: a linear cannot be written in this layout, or a fused set is cut.
        WeightError: a weight holds NaN or Inf; names the linear.
    """
    if to not in LAYOUTS:
        raise OptionError(f"to={to!r}: expected {', '.join(LAYOUTS)}")
    if out.exists():
        raise ModelError(f"{out} is there already: give the name of a new folder")
    shards = Shards(folder)
    packed = _converted(shards)
    sites, report, tags = plan(model, policy)
    policy, changed = closed(policy, tags, round)
    if changed:
        sites, report, _ = plan(model, policy)
    if not sites:
        raise SelectorError(policy.text, "leaves no linear in FP4")
    names = Names(model, [*shards.files, *set(packed.values())])
    job = _Job(shards, LAYOUTS[to], names, sites, report, tags, inputs)
    draft = _new_folder(out)
    try:
        job.write(draft, progress)
        _write_config(draft, folder, job.chosen(), LAYOUTS[to])
        write_text(draft / "README.md", card(policy))
        draft.chmod(0o755)
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Exported(policy, tuple(changed), report, job.bytes_dense, job.bytes_packed, job.shared)


def _new_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error}") from None


class _Job:
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
        self._own = _converted(shards)
        self.bytes_dense = self.bytes_packed = self.shared = 0
        found = {site.tag.fqn: site for site in sites}
        refused = [(row.path, row.reason) for row in report.refused]
        refused += [(path, why) for path, site in found.items() if (why := self._obstacle(site))]
        if refused:
            raise refusal(refused)
        self._sites = {
            name: found[linear.path]
            for name, linear in names.linears.items()
            if linear.path in found
        }
        missing = sorted(set(found) - {site.tag.fqn for site in self._sites.values()})
        if missing:
            raise ModelError(f"{shards.folder} has no weight of {missing[0]}")
        self._sets = self._fused(fused_sets(tags))

    def _obstacle(self, site: LinearSite) -> str | None:
        assert site.scheme is not None
        scheme, format = site.scheme, site.scheme.format
        if site.rows is not None:
            return "a part of a fused weight, and engines take the whole"
        if site.transposed and not site.is_stack:
            return "its weight is stored [in, out], which these layouts do not know"
        if scheme.rotation or scheme.smooths:
            return f"{scheme.quantizer} changes its inputs, which engines do not"
        if site.tag.shape[-1] % format.block_size:
            return f"K={site.tag.shape[-1]} is no multiple of {format.block_size}"
        if format.base not in ("nvfp4", "mxfp4"):
            return f"no engine reads {format}"
        if scheme.activations is Activations.INT8:
            return "activations of 8 bits are fp4graph's own"
        needs = scheme.activations is Activations.SAME and format.has_per_tensor_scale
        if needs and site.tag.fqn not in (self._inputs or {}):
            return "W4A4 needs the range of its inputs, from data"
        if site.is_stack and not self._names.of(site.tag.fqn):
            return "its experts lie in one tensor, and engines take one for each"
        return None

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
                    group = self._sets.get(name, (name,))
                    tensors |= self._packed([each for each in group if each in self._sites])
                    written |= set(group)
                else:
                    tensors[name] = self._shards.get(name)
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
            whole = pack(torch.cat(list(dense.values())), first.scheme, first.tag.fqn)
            found = _split(whole, [len(w) for w in dense.values()])
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


def _rows(site: LinearSite) -> int:
    """Return the rows of all matrices of a linear or of a stack."""
    return math.prod(site.tag.shape[:-1])


def _converted(shards: Shards) -> dict[str, str]:
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


def _split(whole: PackedWeight, rows: Sequence[int]) -> list[PackedWeight]:
    """Return the parts of a weight, one after the other; they share its per-tensor scale."""
    found, start = [], 0
    for count in rows:
        index = torch.arange(start, start + count, device=whole.qdata.device)
        found.append(whole.rows(index))
        start += count
    return found


def _one_scale(packed: Sequence[PackedWeight]) -> list[PackedWeight]:
    """Return weights under one per-tensor scale, the largest; block scales and codes are new.

    The scales of blocks are rounded under the new one, and codes to the nearest values under them.
    """
    tops = [each.per_tensor_scale for each in packed]
    first = tops[0]
    if first is None or all(top is not None and torch.equal(top, first) for top in tops):
        return list(packed)
    format = packed[0].format
    whole = torch.cat([each.dequantize() for each in packed])
    return _split(format.quantize(whole), [each.shape[0] for each in packed])


def _write_config(out: Path, folder: Path, chosen: configs.Chosen, layout: Layout) -> None:
    """Write config.json, and copy all else that is no weight."""
    config: dict[str, Any] = read_json(folder / "config.json")
    if layout is MODELOPT:
        made = configs.modelopt(chosen)
        text = json.dumps(configs.hf_quant(made), indent=2)
        write_text(out / "hf_quant_config.json", text + "\n")
    else:
        made = configs.compressed_tensors(chosen)
    config["quantization_config"] = made
    write_text(out / "config.json", json.dumps(config, indent=2) + "\n")
    for path in folder.iterdir():
        weights = path.suffix in (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5")
        known = path.name in ("config.json", INDEX, "README.md")
        if path.is_file() and not weights and not known and path.stat().st_size < _MOST_COPIED:
            shutil.copy(path, out / path.name)


_MOST_COPIED = 1 << 28
