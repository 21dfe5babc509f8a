"""Small block models in plain torch, and the twin whose weights are rounded by hand."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import fp4graph


class Mlp(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(d, 48), nn.Linear(48, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(torch.tanh(self.q_proj(x)))


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(d), Mlp(d)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, blocks: int, d: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(d) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def net(blocks: int = 3, seed: int = 0, cls: type[Net] = Net) -> Net:
    """Build a random model that wants no gradients."""
    torch.manual_seed(seed)
    return cls(blocks).eval().requires_grad_(False)


def rounded(model: nn.Module, picked: str = "") -> nn.Module:
    """Copy a model, its `*_proj` weights rounded to NVFP4 where `picked` is in the name."""
    model = copy.deepcopy(model)
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight") and picked in name:
            weight.copy_(fp4graph.quantize(weight).dequantize())
    return model
