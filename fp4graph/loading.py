"""Models by name with their linears in FP4: the dense model never exists."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from fp4graph.checkpoints.foreign import layout_of, read_foreign
from fp4graph.conversion import facts, origin
from fp4graph.errors import ModelError, OptionError
from fp4graph.gguf import copy_of, load_gguf
from fp4graph.hf_quantizer import FP4Config, packed_config
from fp4graph.models import LoadedModel, local_folder, locate, named
from fp4graph.pretrained import read_checkpoint
from fp4graph.skeleton import skeleton

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from fp4graph.policy import Select


def load(
    name: str,
    select: Select | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    allow_weights: Sequence[str] = (),
    **options: Any,
) -> nn.Module:
    """Load a causal language model of transformers with its selected linears in FP4.

    A tensor of the checkpoint is read, quantised and freed before the next.

    Args:
        name: as in `fp4graph.models.load`: a folder, a GGUF file or a hub id, of dense weights; or
            a folder that `save` or `save_pretrained` wrote of a packed model. Or a folder in the
            layout of compressed-tensors, ModelOpt or gpt-oss; FP8 of other
            kinds than E4M3 becomes dense.
        select: as in `convert`; None takes what a packed folder says of itself.
        dtype: of what stays dense; None: the checkpoint's own.
        device: where to put it; None: the CPU.
        allow_weights: as in `fp4graph.models.load`.
        options: `format`, `quantizer`, `activations`, `kernel`, `on_refusal` and `calibration`, as
            in `convert`.

    Returns:
        the model, in evaluation mode, without gradients; `report_of(model)` has its rows.

    Raises:
        ModelError: nothing loads by that name; a checkpoint whose weights are not the model's.
        OptionError: no `select` for a dense checkpoint, or one for a packed one; see `convert`.
        SelectorError, RefusalError, WeightError, CalibrationError: see `convert`.
    """
    transformers.utils.logging.disable_progress_bar()
    folder, gguf = locate(name)
    with named(name):
        if gguf is not None:
            file = Path(folder) / gguf
            if not copy_of(file).is_dir():
                load_gguf(file, torch.float32, allow_weights)
            folder = str(copy_of(file))
        given: dict[str, Any] = {} if device is None else {"device_map": {"": device}}
        loaded = transformers.AutoConfig.from_pretrained(folder)
        layout = layout_of(loaded)
        packed = packed_config(loaded) is not None or layout is not None
        if packed and (select is not None or options):
            raise OptionError("its linears are packed already: it says itself what runs how")
        if not packed and select is None:
            raise OptionError("its weights are dense: say what runs in FP4, select=")
        source: str | None = folder
        if layout is not None:
            given |= _translated(local_folder(name), loaded, layout, dtype)
            source = None
        config = None if select is None else FP4Config(select, dense=origin(name), **options)
        if config is not None:
            given["quantization_config"] = config
        try:
            given = {"dtype": dtype or "auto", **given}
            model: nn.Module = read_checkpoint(source, allow=allow_weights, **given)
        except RuntimeError:
            if config is not None and config.failure.error is not None:
                raise config.failure.error from None
            raise
    return model.eval().requires_grad_(False)


def _translated(
    folder: Path, config: Any, layout: dict[str, Any], dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return options of `from_pretrained` that load a checkpoint in a layout of others."""
    known = dtype or getattr(config, "dtype", None) or torch.bfloat16
    del config.quantization_config
    hollow = skeleton(config, known)
    found = read_foreign(folder, hollow, layout, known)
    config.quantization_config = facts(found.policy, "raise", (), "")
    return {"kind": type(hollow), "config": config, "state_dict": found.tensors, "dtype": known}


def dense_of(name: str) -> str | None:
    """Return what a folder of packed weights was converted from, empty where it does not say.

    None for a name of dense weights, whether there is such a model or not.
    """
    if not (Path(name) / "config.json").is_file():
        return None
    with named(name):
        loaded = transformers.AutoConfig.from_pretrained(name)
        config = packed_config(loaded)
    if config is None:
        return None if layout_of(loaded) is None else ""
    return config.dense or ""


def load_packed(
    name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> LoadedModel:
    """Load a folder of packed weights for a study.

    Args:
        name: the folder.
        dtype: as in `load`.
        device: as in `load`.

    Raises:
        ModelError: see `load`.
    """
    again = partial(load_packed, name, dtype, device)
    return LoadedModel(name, load(name, dtype=dtype, device=device), None, again=again)


def save(model: Any, folder: Path, tokenizer: Any = None) -> None:
    """Write a packed model and its tokenizer into a new folder, whole or not at all.

    Raises:
        ModelError: the folder is there already, or cannot be written; not enough disk.
    """
    if folder.exists():
        raise ModelError(f"{folder} is there already: give the name of a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            sizes = f"about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise ModelError(f"cannot write {folder}: it takes {sizes}")
        draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            model.save_pretrained(draft)
            if tokenizer is not None:
                tokenizer.save_pretrained(draft)
            draft.chmod(0o755)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except Exception as error:  # safetensors raises its own where a disk is full
        if isinstance(error, OSError) or "SafetensorError" in type(error).__name__:
            raise ModelError(f"cannot write {folder}: {error}") from None
        raise
