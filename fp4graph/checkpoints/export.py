"""Dense checkpoints written packed for other engines, file by file."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from fp4graph.checkpoints import configs
from fp4graph.checkpoints.fused import closed
from fp4graph.checkpoints.job import Job, converted
from fp4graph.checkpoints.layouts import LAYOUTS, MODELOPT, Layout
from fp4graph.checkpoints.names import Names
from fp4graph.checkpoints.shards import INDEX, Shards, read_json
from fp4graph.conversion import plan
from fp4graph.errors import ModelError, OptionError, SelectorError
from fp4graph.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from fp4graph.checkpoints.fused import Round
    from fp4graph.linears.tags import LinearTag
    from fp4graph.policy import Policy
    from fp4graph.report import Report


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        policy: what runs how, rounded to whole fused sets.
        changed: linears that the rounding took in or left out.
        tags: all linears of the model.
        report: a row for each linear.
        bytes_dense: of the quantised linears before.
        bytes_packed: of the same as written.
        shared: sets whose linears got one per-tensor scale.
    """

    policy: Policy
    changed: tuple[LinearTag, ...]
    tags: tuple[LinearTag, ...]
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
    card: Callable[[Policy, Sequence[LinearTag]], str] = lambda policy, tags: "",
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
        card: gives the text of README.md, of what runs how and all linears.

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
    packed = converted(shards)
    sites, report, tags = plan(model, policy)
    policy, changed = closed(policy, tags, round)
    if changed:
        sites, report, _ = plan(model, policy)
    if not sites:
        raise SelectorError(policy.text, "leaves no linear in FP4")
    names = Names(model, [*shards.files, *set(packed.values())])
    job = Job(shards, LAYOUTS[to], names, sites, report, tags, inputs)
    draft = _new_folder(out)
    try:
        job.write(draft, progress)
        _write_config(draft, folder, job.chosen(), LAYOUTS[to])
        write_text(draft / "README.md", card(policy, tags))
        draft.chmod(0o755)
        draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {out}: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    sizes = (job.bytes_dense, job.bytes_packed, job.shared)
    return Exported(policy, tuple(changed), tuple(tags), report, *sizes)


def _new_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    except OSError as error:
        raise ModelError(f"cannot write {out}: {error}") from None


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
