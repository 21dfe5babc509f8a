"""A whole model on the device, by selector, with CUDA graphs: random weights of a real shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import fp4graph
from fp4graph import ModelError, models
from fp4graph.memory import available
from fp4graph.study.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fp4graph.gpu_check.device import Device
    from fp4graph.models import LoadedModel
    from fp4graph.study.latency import LatencyRow

SELECTORS = ("all", "mlp")
_NAMES = ("qwen2.5-7b-random", "qwen2.5-3b-random", "qwen2.5-1.5b-random", "qwen2.5-0.5b-random")
_PARTS = 3  # of the free memory: the weights, their packed copies, caches and graphs
_DTYPE = torch.bfloat16


def load(device: Device) -> LoadedModel:
    """Return the largest model that a device has room for.

    Raises:
        ModelError: it has room for none.
    """
    if device.where.type == "cuda":
        torch.cuda.empty_cache()  # what earlier steps freed counts as taken
    room = available(device.where) / _PARTS
    for name in _NAMES:
        outline = models.outline(name, _DTYPE).model
        if sum(each.nbytes for each in outline.parameters()) <= room:
            return models.load(name, _DTYPE, device=device.where)
    raise ModelError(
        f"{room * _PARTS / 1e9:.1f} GB are free on {device.where}: too little for a model"
    )


def generation(device: Device) -> Iterable[LatencyRow]:
    """Time it, dense and by selector; the rows of `fp4graph latency`.

    Raises:
        ModelError: see `load`.
    """
    return fp4graph.study.latency(load(device), SELECTORS, memory=False, progress=SILENT)
