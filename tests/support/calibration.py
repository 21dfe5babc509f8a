"""What tests of calibration share: batches to calibrate with, and a text to look at the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from support.models import tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCHES = [tokens(48, batch=2, seed=seed) for seed in range(4)]
TEST = tokens(48, batch=2, seed=9)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Return a model's logits on the text."""
    return model(TEST, use_cache=False).logits
