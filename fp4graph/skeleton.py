"""A model without its weights: how large it is and which linears it has, before it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers

from fp4graph.errors import ModelError
from fp4graph.memory import available

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_SMALLER = torch.bfloat16


def skeleton(source: str | Path | Any, dtype: torch.dtype, **options: Any) -> nn.Module:
    """Make a causal language model of transformers on the meta device.

    Args:
        source: folder, hub id or configuration.
        dtype: of all weights.
        options: further ones of `AutoConfig.from_pretrained`.
    """
    config = source
    if not isinstance(source, transformers.PretrainedConfig):
        config = transformers.AutoConfig.from_pretrained(source, **options)
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def checkpoint_skeleton(folder: str | Path) -> nn.Module:
    """Make the model of a folder on the meta device, in the dtype that its configuration says."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return skeleton(config, config.dtype or torch.float32)


def check_memory(count: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Check that a device has room for so many parameters.

    Raises:
        ModelError: it has not; says how much is needed.
    """
    needed, free = count * dtype.itemsize, available(torch.device(device))
    if needed <= free:
        return
    smaller = count * _SMALLER.itemsize
    advice = "more memory is needed, or --stream: ablate, sensitivity, outliers, calibrate have it"
    if dtype.itemsize > _SMALLER.itemsize and smaller <= free:
        advice = f"in bfloat16 it takes {smaller / 1e9:.1f} GB: --dtype bfloat16"
    name = str(dtype).removeprefix("torch.")
    raise ModelError(
        f"its {count / 1e6:.0f} million parameters take {needed / 1e9:.1f} GB in {name}, and "
        f"{free / 1e9:.1f} GB are free on {device}; {advice}"
    )


def parameters_of(model: nn.Module) -> int:
    """Return how many values a model's parameters have."""
    return sum(parameter.numel() for parameter in model.parameters())
