"""What commands need, imported before processes are forked; a first trace imports most of torch."""

from __future__ import annotations

import matplotlib.pyplot as plt
import torch
from support.models import tiny, tokens

import fp4graph.cli
from fp4graph import TracedModel

__all__ = ["fp4graph"]

torch.set_num_threads(1)  # a process with threads is not to be forked
with torch.no_grad():
    TracedModel(tiny("llama"))(tokens(), use_cache=False)
torch._dynamo.reset()
plt.close(plt.figure())
