"""How much memory a device has left."""

from __future__ import annotations

import psutil
import torch

_SHARE = 1 / 3  # a study keeps two things, and the model runs beside them


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are at most a third of what a device has free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = psutil.virtual_memory().available
    return size <= _SHARE * free
