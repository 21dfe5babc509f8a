"""Five block models whose names tell nothing: `a`, `b`, `c` ... below `layers.N`."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

D, HEADS, HEAD = 32, 4, 8


class Letters(nn.Module):
    """Linears named by letters, without bias; `sizes` are (in, out)."""

    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)
        self.register_buffer("shift", torch.linspace(0, 0.1, 2))
        for letter, (inside, out) in sizes.items():
            setattr(self, letter, nn.Linear(inside, out, bias=False))


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """Rotate as a rotary embedding does."""
    half = x.shape[-1] // 2
    at = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] / torch.arange(1, half + 1)
    angle = torch.cat((at, at), -1)
    first, second = x.chunk(2, -1)
    return x * angle.cos() + torch.cat((-second, first), -1) * angle.sin()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class PreNorm(Letters):
    """Softmax written out, grouped keys, a gated MLP."""

    roles: ClassVar = {"a": "k", "b": "q", "c": "o", "d": "v", "e": "up", "f": "down", "g": "gate"}

    def __init__(self) -> None:
        super().__init__(
            a=(D, D // 2), b=(D, D), c=(D, D), d=(D, D // 2), e=(D, 48), f=(48, D), g=(D, 48)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = turned(heads(self.b(h))), turned(heads(self.a(h))), heads(self.d(h))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(-1, -2) * HEAD**-0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.c(y)
        h = self.norm(x)
        return x + self.f(silu(self.g(h)) * self.e(h))


class Parallel(Letters):
    """Attention and MLP side by side, no gate."""

    roles: ClassVar = {"a": "up", "b": "down", "c": "q", "d": "k", "e": "v", "f": "o"}

    def __init__(self) -> None:
        super().__init__(a=(D, 48), b=(48, D), c=(D, D), d=(D, D), e=(D, D), f=(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        y = attend(turned(heads(self.c(h))), turned(heads(self.d(h))), heads(self.e(h)))
        h = self.a(h)
        h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h.pow(3))))
        return x + self.f(y) + self.b(h)


class Fused(Letters):
    """One matrix for q, k, v and one for gate and up, and an output gate."""

    roles: ClassVar = {"a": "qkv", "b": "o", "c": "gate_up", "d": "down", "e": "attn_gate"}

    def __init__(self) -> None:
        super().__init__(a=(D, 3 * D), b=(D, D), c=(D, 96), d=(48, D), e=(D, D))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (heads(part) for part in self.a(h).split(D, -1))
        x = x + self.b(attend(turned(q), turned(k), v) * self.e(h).sigmoid())
        gate, up = self.c(self.norm(x)).chunk(2, -1)
        return x + self.d(up * silu(gate))


class Latent(Letters):
    """Low-rank q, and k and v from one compressed state beside a rotary part."""

    roles: ClassVar = {"a": "kv_b", "b": "q_a", "c": "o", "d": "kv_a", "e": "q_b"}

    def __init__(self) -> None:
        super().__init__(a=(16, 2 * D), b=(D, 16), c=(D, D), d=(D, 16 + HEAD), e=(16, 2 * D))
        self.small = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q = self.e(self.small(self.b(h))).unflatten(-1, (HEADS, 2 * HEAD)).transpose(1, 2)
        state, rotary = self.d(h).split((16, HEAD), -1)
        k, v = self.a(self.small(state)).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(2, -1)
        q = torch.cat((q[..., :HEAD], turned(q[..., HEAD:])), -1)
        k = torch.cat((k, turned(rotary[:, None]).expand(-1, HEADS, -1, -1)), -1)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.c(y.transpose(1, 2).flatten(2))


class Mixture(Letters):
    """A router over two experts, and a shared one."""

    roles: ClassVar = {
        "a": "router", "b": "up", "c": "down", "d": "up", "e": "down", "f": "gate", "g": "up",
        "h": "down",
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__(
            a=(D, 2), b=(D, 48), c=(48, D), d=(D, 48), e=(48, D), f=(D, 48), g=(D, 48), h=(48, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weight, chosen = (self.a(h).softmax(-1) + self.shift).topk(1)
        first, second = self.c(self.b(h).relu()), self.e(self.d(h).relu())
        y = torch.where(chosen == 0, first, second) * weight
        return x + y + self.h(silu(self.f(h)) * self.g(h))


BLOCKS = (PreNorm, Parallel, Fused, Latent, Mixture)


class Model(nn.Module):
    """Three blocks of a kind."""

    def __init__(self, block: type[Letters]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x
